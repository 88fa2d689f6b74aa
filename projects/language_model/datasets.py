"""Sequences of bytes out of a text."""

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from condattn.openmmlab.errors import UserError

from .text import BUILTIN, part_of_text, read_text


@DATASETS.register_module()
class ByteSequences(BaseDataset):
    """Sequences of equal length out of one part of a text, in the order of their positions.

    Samples are ``tokens`` (length,) of uint8, ``start``, the position of the first byte in the whole text, and
    ``sample_id``, such as '256-384', the positions of the first byte and of the first byte behind the sequence. A rest
    of the part that is shorter than ``length`` is left out.

    Args:
        part: 'train', 'validation' or 'test'; see :func:`.text.part_of_text`.
        length: Number of bytes in a sequence.
        stride: Number of bytes from the beginning of one sequence to that of the next; default: ``length``, so that
            each byte is in one sequence.
        path: A text file or a folder of ``.txt`` files; see :func:`.text.read_text`. Default: the built-in text.
        **kwargs: Arguments of mmengine's ``BaseDataset``.

    Raises:
        UserError: If the part, the length or the stride is invalid, the text cannot be read, or the part is shorter
            than one sequence.
    """

    def __init__(self, part: str, length: int, stride: int | None = None, path: str = BUILTIN, **kwargs) -> None:
        self.part, self.length, self.stride, self.path = part, length, length if stride is None else stride, path
        for name in ("length", "stride"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name}: expected a whole number from 1 up, got {value!r}")
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the text, and list the sequences of the part."""
        self.text = np.frombuffer(read_text(self.path), np.uint8)
        begin, end = part_of_text(len(self.text), self.part)
        if end - begin < self.length:
            raise UserError(
                f"the text {self.path} is too short: it has {len(self.text)} bytes, of which the "
                f"{self.part} part is {end - begin}, and a sequence has {self.length}; expected a text of at least "
                f"{10 * self.length} bytes: use a longer text or a smaller length"
            )
        starts = range(begin, end - self.length + 1, self.stride)
        return [dict(start=start, sample_id=f"{start}-{start + self.length}") for start in starts]

    def get_data_info(self, idx: int) -> dict:
        """What :class:`ByteSequences` describes, for the sequence ``idx``."""
        info = super().get_data_info(idx)
        info["tokens"] = self.text[info["start"] : info["start"] + self.length]
        return info
