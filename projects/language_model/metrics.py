"""How well bytes are predicted."""

import math
from collections.abc import Sequence

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class ByteLoss(BaseMetric):
    """Cross entropy and accuracy over all predicted bytes of a data set.

    ``nats_per_byte`` is the mean cross entropy of the predicted bytes, ``bits_per_byte`` the same in bits, and
    ``accuracy`` the share in percent of the predicted bytes that have the largest logit. ``unigram_bits_per_byte`` is
    the entropy of the frequencies of the predicted bytes: the least that a prediction without context can reach. The
    names have ``prefix`` and a slash in front; for a masked language model, all are per masked byte.

    Args:
        **kwargs: ``collect_device``, ``prefix`` and ``collect_dir`` of mmengine's ``BaseMetric``.
    """

    metric_names = ("nats_per_byte", "bits_per_byte", "accuracy", "unigram_bits_per_byte")

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep what the model has predicted: dictionaries as of ``ByteModel`` with the mode 'predict'."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """The four numbers."""
        counts = np.bincount(np.concatenate([result["bytes"] for result in results]))
        total = int(counts.sum())
        # No name has 'loss' in it: of such values, mmengine logs the mean over the last validations.
        nats = math.fsum(result["nats"] for result in results) / total
        frequencies = counts[counts > 0] / total
        return dict(
            nats_per_byte=nats,
            bits_per_byte=nats / math.log(2),
            accuracy=100 * sum(result["correct"] for result in results) / total,
            unigram_bits_per_byte=float(-(frequencies * np.log2(frequencies)).sum()),
        )
