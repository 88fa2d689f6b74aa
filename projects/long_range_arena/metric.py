"""The share of sequences that are classified correctly."""

from collections.abc import Sequence

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class SequenceAccuracy(BaseMetric):
    """``accuracy/top1``: percentage of the samples whose ``pred_label`` is their ``gt_label``."""

    default_prefix = "accuracy"
    metric_names = ("top1",)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Compare the labels of a batch."""
        self.results += [float(sample["pred_label"] == sample["gt_label"]) for sample in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        """The percentage over all batches."""
        return dict(top1=100 * sum(results) / len(results))
