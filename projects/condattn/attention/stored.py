"""Check that weights can be written: each must be a parameter of one layer alone."""

from collections.abc import Iterable

from torch import nn


def check_writable(model: nn.Module, weights: Iterable[tuple[nn.Module, str]]) -> None:
    """Raise a one-line ``ValueError`` if writing one of these weights would change other layers of ``model`` as well.

    Args:
        model: The model that contains the layers.
        weights: Layers in it, each with the name of its weight.
    """
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, value in module.named_parameters(name, recurse=False, remove_duplicate=False):
            users.setdefault(id(value), []).append(key)
    for owner, parameter in weights:
        names = users.get(id(getattr(owner, parameter)), [])
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one parameter, so that writing to it for one layer would change the other; "
                "give each layer a parameter of its own: layer.weight = nn.Parameter(layer.weight.detach().clone())"
            )
