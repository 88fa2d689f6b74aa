"""A checkpoint knows its conditioning, and is not loaded into a model that is conditioned otherwise."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ...condition import conditioning_of, same_conditioning
from ..errors import UserError
from ..models.loading import ENTRY, Record, drop_record, with_record
from ..models.wrapping import unwrapped


def record_of(model: nn.Module) -> Record:
    """What a checkpoint records of ``model``: site name -> its methods, as plain data."""
    return conditioning_of(unwrapped(model))


def check_conditioning(checkpoint: dict, path: str, model: nn.Module) -> None:
    """Check that the model is conditioned as the one was whose weights ``checkpoint`` holds.

    A checkpoint without a record is of a model that was not conditioned.

    Raises:
        UserError: If it is not; the message shows both, and the line of the configuration to change.
    """
    recorded, own = checkpoint.get("meta", {}).get(ENTRY) or {}, record_of(model)
    other = [site for site in own if not same_conditioning(recorded.get(site, []), own[site])]
    if not other:
        return
    theirs, ours = _summary(recorded, other), _summary(own, other)
    advice = f"set conditioning={theirs} in the configuration to load it as it was trained"
    if theirs == "'none'":
        advice += ", or make a conditioned checkpoint of it with tools/checkpoints/calibrate.py"
    raise UserError(
        f"{path} is of a model with conditioning={theirs} at {len(other)} of {len(own)} attention sites "
        f"({', '.join(other[:2])}{', ...' if len(other) > 2 else ''}), where this one has conditioning={ours}, so that "
        f"its weights mean something else here: {advice}, or load it all the same with --other-conditioning"
    )


def _summary(record: Record, sites: list[str]) -> str:
    """The methods of the first of these sites, as a line of a configuration."""
    methods = record.get(sites[0], [])
    calls = [f"dict({', '.join(f'{key}={value!r}' for key, value in method.items())})" for method in methods]
    if not calls:
        return "'none'"
    return calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"


@HOOKS.register_module()
class ConditioningGuardHook(Hook):
    """Record the conditioning of every site in checkpoints, and refuse those of a model conditioned otherwise.

    Args:
        allow_other: Load them all the same.
    """

    priority = "VERY_LOW"

    def __init__(self, allow_other: bool = False) -> None:
        self.allow_other = allow_other

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the record, for the tools and for whatever loads the weights by itself."""
        checkpoint.setdefault("meta", {})[ENTRY] = record_of(runner.model)
        checkpoint["state_dict"] = with_record(checkpoint["state_dict"], unwrapped(runner.model))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare, before the weights are loaded.

        Raises:
            UserError: If the model is conditioned otherwise.
        """
        if self.allow_other:
            drop_record(checkpoint.get("state_dict", {}))
        else:
            check_conditioning(checkpoint, "the checkpoint", runner.model)
