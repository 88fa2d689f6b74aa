"""Say when an evaluation reports nothing, and keep the scores of an earlier one out of the log."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class EmptyEvaluationHook(Hook):
    """Warn if a validation reports no score, and forget those of earlier validations.

    mmdet's ``CocoMetric`` reports nothing if no image has a prediction. mmengine's log processor then repeats the
    scores of the last validation that had some, as if they were new.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Remove earlier scores from the runner's message hub if there are no new ones."""
        if metrics:
            self._names |= {f"val/{name}" for name in metrics}
            return
        runner.logger.warning(
            f"the validation after iteration {runner.iter} reports no score; if the model predicts objects, it "
            "predicted none on any image"
        )
        for name in self._names:
            runner.message_hub.log_scalars.pop(name, None)
