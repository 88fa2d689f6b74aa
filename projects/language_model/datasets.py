"""Sequences of bytes out of a text."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from mmengine.dataset import Compose
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from condattn.openmmlab.errors import UserError

from .text import BUILTIN, part_of_text, read_text


@DATASETS.register_module()
class ByteSequences(Dataset):
    """Sequences of equal length out of one part of a text, in the order of their positions.

    Samples are ``tokens`` (length,) of uint8, ``start``, the position of the first byte in the whole text, and
    ``sample_id``, such as '256-384', the positions of the first byte and of the first byte behind the sequence. A rest
    of the part that is shorter than ``length`` is left out. Memory is needed for the text alone.

    Args:
        part: 'train', 'validation' or 'test'; see :func:`.text.part_of_text`.
        length: Number of bytes in a sequence.
        stride: Number of bytes from the beginning of one sequence to that of the next; default: ``length``, so that
            each byte is in one sequence.
        path: A text file or a folder of ``.txt`` files; see :func:`.text.read_text`. Default: the built-in text.
        max_sequences: Largest number of sequences. Of a part that has more, evenly spaced ones are used. Default: no
            limit.
        pipeline: Transforms of the samples.

    Raises:
        UserError: If a number or the part is invalid, the text cannot be read, or the part is shorter than one
            sequence.
    """

    metainfo: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        part: str,
        length: int,
        stride: int | None = None,
        path: str = BUILTIN,
        max_sequences: int | None = None,
        pipeline: Sequence[dict | Callable] = (),
    ) -> None:
        self.pipeline = Compose(pipeline)
        stride = length if stride is None else stride
        limits = {} if max_sequences is None else dict(max_sequences=max_sequences)
        for name, value in dict(length=length, stride=stride, **limits).items():
            if type(value) is not int or value < 1:
                raise UserError(f"{name}: expected a whole number from 1 up, got {value!r}")
        self.length, self.text = length, np.frombuffer(read_text(path), np.uint8)
        begin, end = part_of_text(len(self.text), part)
        if end - begin < length:
            raise UserError(
                f"the text {path} is too short: it has {len(self.text)} bytes, of which the {part} part is "
                f"{end - begin}, and a sequence has {length}; expected a text of at least {10 * length} bytes: use a "
                "longer text or a smaller length"
            )
        self.starts = range(begin, end - length + 1, stride)
        if max_sequences is not None and len(self.starts) > max_sequences:
            self.starts = self.starts[:: -(-len(self.starts) // max_sequences)]

    def __len__(self) -> int:
        return len(self.starts)

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """What :class:`ByteSequences` describes, for the sequence ``idx``."""
        start = self.starts[idx]
        end = start + self.length
        return dict(tokens=self.text[start:end], start=start, sample_id=f"{start}-{end}", sample_idx=idx)

    def __getitem__(self, idx: int) -> Any:
        """The sequence ``idx`` as the pipeline returns it."""
        return self.pipeline(self.get_data_info(idx))
