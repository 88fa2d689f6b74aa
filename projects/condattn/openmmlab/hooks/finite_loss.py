"""Stop a training whose loss or weights are not finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ...attention.rules import find_sites
from ...wording import some
from ..errors import UserError
from ..models.wrapping import unwrapped
from .atomic_checkpoint import LAST


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop a run whose loss is not finite before the weights are updated with it, and name the probable cause."""

    def before_train(self, runner: Runner) -> None:
        """Register the forward hook that checks the losses."""
        self._runner = runner
        model = unwrapped(runner.model)
        self._hook = model.register_forward_hook(self._check, with_kwargs=True)

    def after_train(self, runner: Runner) -> None:
        """Remove the forward hook."""
        self._hook.remove()

    def _check(self, model: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if not (model.training and isinstance(output, dict)):
            return
        losses = {name: value for name, value in output.items() if "loss" in name}
        bad = [name for name, value in losses.items() if not all(part.isfinite().all() for part in _tensors(value))]
        anywhere = torch.tensor(float(bool(bad)))
        dist.all_reduce(anywhere, op="max")  # all processes stop and rerun the model together
        if not anywhere:
            return
        self._hook.remove()
        try:
            trouble = find_trouble(model, args, kwargs)
        except Exception as error:  # the loss is reported whatever the second forward does
            trouble = [f"the attention sites could not be examined ({type(error).__name__}: {error})"]
        troubles = _union(dist.all_gather_object(trouble))
        raise UserError(
            f"{', '.join(_union(dist.all_gather_object(bad)))} is not finite in iteration {self._runner.iter + 1}; "
            f"{'; '.join(troubles) or 'the attention sites are sound'}; the last checkpoint is {_last(self._runner)}; "
            "lower the learning rate, clip the gradients, or look at the data of this iteration"
        )


@contextmanager
def weights_blamed(runner: Runner) -> Iterator[None]:
    """Explain an exception in a training by weights that are not finite, if they are not.

    Such weights, after an update with gradients that overflowed, can raise exceptions before there is a loss:
    decompositions of matrices and the assignment of predictions to objects refuse NaN.

    Raises:
        UserError: If there was an exception, and weights are not finite.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        parameters = runner.model.named_parameters()
        local = ((name, p.to_local() if hasattr(p, "to_local") else p) for name, p in parameters)
        if not (bad := [name for name, value in local if not value.isfinite().all()]):
            raise
        raise UserError(
            f"{some(bad)} is not finite in iteration {runner.iter + 1} ({type(error).__name__}: {error}); the last "
            f"checkpoint is {_last(runner)}; lower the learning rate, or clip the gradients"
        ) from error


def _last(runner: Runner) -> str:
    """Path of the newest checkpoint of a run, as text."""
    newest = Path(runner.work_dir, LAST)
    return newest.read_text().strip() if newest.exists() else "none"


@torch.no_grad()
def find_trouble(model: nn.Module, args: tuple, kwargs: dict) -> list[str]:
    """Run ``model`` once more, and name the attention sites whose values explain a loss that is not finite.

    Returns:
        One text for each kind of problem: weights that are not finite; head outputs that are not finite; rows of head
        outputs that are zero; queries and keys so long that the softmax saturates (the bound of its logits exceeds
        1000).
    """
    found: dict[str, list[str]] = {}
    hooks = []

    def note(kind: str, site: str) -> None:
        if site not in found.setdefault(kind, []):
            found[kind].append(site)

    for site in find_sites(model):
        lengths: dict[str, float] = {}
        for name in ("q", "k"):
            projection = getattr(site, name)
            if projection is None:
                continue
            if not projection.weight.isfinite().all():
                note("weights that are not finite", site.name)
            if isinstance(projection.owner, nn.Linear):

                def measure(module, args, output, name=name, part=projection, lengths=lengths, site=site):
                    part = torch.cat([output[..., r] for r in part.rows], -1).unflatten(-1, (site.heads_of(part), -1))
                    lengths[name] = part.norm(dim=-1).max().item()
                    if lengths.keys() == {"q", "k"} and lengths["q"] * lengths["k"] / part.shape[-1] ** 0.5 > 1000:
                        note("saturated logits", site.name)

                hooks.append(projection.owner.register_forward_hook(measure))
        if site.out is not None and not isinstance(site.out.owner, nn.MultiheadAttention):

            def look(module, args, site=site):
                if not args[0].isfinite().all():
                    note("head outputs that are not finite", site.name)
                elif (args[0].abs().amax(site.out.axis) == 0).any():
                    note("zero rows", site.name)

            hooks.append(site.out.owner.register_forward_pre_hook(look))
    try:
        model.forward(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return [f"{kind} at {some(sites)}" for kind, sites in found.items()]


def _union(lists: list[list[str]]) -> list[str]:
    """The distinct items of all lists, in order of their first occurrence."""
    return list(dict.fromkeys(item for one in lists for item in one))


def _tensors(value: Tensor | list | tuple) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
