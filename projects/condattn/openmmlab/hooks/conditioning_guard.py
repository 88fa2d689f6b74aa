"""Record the conditioning in checkpoints, and refuse to load them into a model that is conditioned otherwise."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..models.loading import ENTRY, check_conditioning, drop_record, record_of, with_record
from ..models.wrapping import unwrapped


@HOOKS.register_module()
class ConditioningGuardHook(Hook):
    """Record the conditioning of every site in checkpoints, and refuse those of a model conditioned otherwise.

    Args:
        allow_other: Load such checkpoints instead of refusing them.
    """

    priority = "VERY_HIGH"  # before EMAHook, which loads the same weights into its copy of the model

    def __init__(self, allow_other: bool = False) -> None:
        self.allow_other = allow_other

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the record to ``meta``, for the tools, and to the state dict's metadata, for all other loaders."""
        checkpoint.setdefault("meta", {})[ENTRY] = record_of(runner.model)
        checkpoint["state_dict"] = with_record(checkpoint["state_dict"], unwrapped(runner.model))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the conditioning before the weights are loaded.

        Raises:
            UserError: If the model is conditioned otherwise.
        """
        if self.allow_other:
            drop_record(checkpoint.get("state_dict", {}))
        else:
            check_conditioning(checkpoint, "the checkpoint", runner.model)
