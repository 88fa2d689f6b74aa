"""Say when an evaluation reports nothing, and keep the scores of an earlier one out of the log."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

TIMES = ("val/time", "val/data_time")
"""What mmengine logs of a validation that are not scores."""


@HOOKS.register_module()
class EmptyEvaluationHook(Hook):
    """Warn if a validation reports no score, and forget those of earlier validations.

    mmdet's ``CocoMetric`` reports nothing if no image has a prediction. mmengine's log processor then repeats the
    scores of the last validation that had some, as if they were new; a resumed run has those of its checkpoint.
    """

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Remove earlier scores from the runner's message hub if there are no new ones."""
        if metrics:
            return
        runner.logger.warning(
            f"the validation after iteration {runner.iter} reports no score; if the model predicts objects, it "
            "predicted none on any image"
        )
        scalars = runner.message_hub.log_scalars
        for name in [name for name in scalars if name.startswith("val/") and name not in TIMES]:
            del scalars[name]
