"""A linear warm-up that reaches the full rate, however short it is."""

from mmengine.optim import LinearLR
from mmengine.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class WarmUpLR(LinearLR):
    """mmengine's ``LinearLR``, but a warm-up of a single step has the full rate instead of the start factor.

    Epochs may be fractions here; a warm-up that is converted from epochs to iterations has at least one step.
    """

    @classmethod
    def build_iter_from_epoch(cls, *args, epoch_length: int, begin: float = 0, end: float, **kwargs):
        """Build a scheduler that counts iterations from the settings of one that counts epochs."""
        first = round(begin * epoch_length)
        kwargs.update(begin=first, end=max(round(end * epoch_length), first + 1), by_epoch=False)
        return cls(*args, **kwargs)

    def _get_value(self) -> list[float]:
        if self.total_iters == 0:
            return [group[self.param_name] for group in self.optimizer.param_groups]
        return super()._get_value()
