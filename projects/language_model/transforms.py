"""From a sequence of bytes to what a model reads and what it is to predict."""

import numpy as np
import torch
from mmengine.registry import TRANSFORMS

from condattn.openmmlab.errors import UserError

from .tokens import BEGIN, BYTES, MASK, UNSCORED


@TRANSFORMS.register_module()
class NextByte:
    """Let a decoder predict each byte from those before it.

    It takes ``tokens`` (length,), and returns ``inputs`` (length,), the token ``BEGIN`` and all bytes but the last one,
    and ``data_samples`` (length,), the bytes, both of int64.
    """

    def __call__(self, results: dict) -> dict:
        """Make a training or test sample."""
        tokens = results["tokens"].astype(np.int64)
        return dict(inputs=torch.from_numpy(np.append(BEGIN, tokens[:-1])), data_samples=torch.from_numpy(tokens))


@TRANSFORMS.register_module()
class MaskedBytes:
    """Let an encoder recover bytes that it does not see, as BERT is trained (arXiv 1810.04805).

    Positions are drawn at random. Of those, 80 % become the token ``MASK``, 10 % a random byte, and 10 % stay as they
    are. It takes ``tokens`` (length,) and ``start``, and returns ``inputs`` (length,), the changed tokens, and
    ``data_samples`` (length,), the original bytes at the drawn positions and ``UNSCORED`` elsewhere, both of int64.

    Args:
        share: Share of the positions that are drawn; at least one is.
        fixed: Draw by the position of the sequence in the text, so that each evaluation masks the same bytes. If
            False, draw by NumPy's global random state, which the seed of a run and an exact resume set.

    Raises:
        UserError: If ``share`` is not above 0 and at most 1.
    """

    def __init__(self, share: float = 0.15, fixed: bool = False) -> None:
        if not 0 < share <= 1:
            raise UserError(f"MaskedBytes: expected share above 0 and at most 1, got {share}")
        self.share, self.fixed = share, fixed

    def __call__(self, results: dict) -> dict:
        """Make a training or test sample."""
        rng = np.random.default_rng(results["start"] if self.fixed else np.random.randint(2**31))
        tokens = results["tokens"].astype(np.int64)
        number = max(1, round(self.share * len(tokens)))
        drawn = rng.choice(len(tokens), number, replace=False)
        targets = np.full_like(tokens, UNSCORED)
        targets[drawn] = tokens[drawn]
        inputs, kind = tokens.copy(), rng.random(number)
        inputs[drawn[kind < 0.8]] = MASK
        random = drawn[(kind >= 0.8) & (kind < 0.9)]
        inputs[random] = rng.integers(BYTES, size=len(random))
        return dict(inputs=torch.from_numpy(inputs), data_samples=torch.from_numpy(targets))
