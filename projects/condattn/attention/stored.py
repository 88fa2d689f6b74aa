"""Check that weights can be written: each must be stored, as a parameter of one layer alone."""

from collections.abc import Iterable

from torch import nn


def check_stored(owner: nn.Module, parameter: str, place: str) -> None:
    """Raise a one-line ``ValueError`` if a weight of ``owner``, at ``place``, is computed from other parameters.

    What is written to such a weight is lost in the next forward.
    """
    if parameter not in dict(owner.named_parameters(recurse=False, remove_duplicate=False)):
        raise ValueError(
            f"{place}: the {parameter} of a {type(owner).__name__} cannot be written, because every forward computes "
            "it anew; make it a parameter with torch.nn.utils.prune.remove, remove_spectral_norm, remove_weight_norm "
            "or parametrize.remove_parametrizations first"
        )


def check_writable(model: nn.Module, weights: Iterable[tuple[nn.Module, str]]) -> None:
    """Raise a one-line ``ValueError`` unless these weights can be written without changing other layers of ``model``.

    They cannot if they are computed, or divided among processes (FSDP2).

    Args:
        model: The model that contains the layers.
        weights: Layers in it, each with the name of its weight.
    """
    users: dict[int, list[str]] = {}
    places = {module: name for name, module in model.named_modules()}
    for module, name in places.items():
        for key, value in module.named_parameters(name, recurse=False, remove_duplicate=False):
            users.setdefault(id(value), []).append(key)
    for owner, parameter in weights:
        check_stored(owner, parameter, places.get(owner) or "(the model itself)")
        if hasattr(getattr(owner, parameter), "full_tensor"):
            raise ValueError(
                f"{places.get(owner) or '(the model itself)'}: the {parameter} of a {type(owner).__name__} is divided "
                "among processes (FSDP2); write to the weights of a model that is not, such as one that loads the "
                "checkpoint of the training"
            )
        names = users.get(id(getattr(owner, parameter)), [])
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one parameter, so that writing to it for one layer would change the other; "
                "give each layer a parameter of its own: layer.weight = nn.Parameter(layer.weight.detach().clone())"
            )
