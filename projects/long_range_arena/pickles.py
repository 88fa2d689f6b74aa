"""Read pickles of plain values and NumPy arrays, and of nothing that could run code."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError

ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}
"""What a pickle of NumPy arrays names; version 2 of NumPy has moved the last."""


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows dictionaries, lists, numbers, texts and NumPy arrays alone.

    Raises:
        pickle.UnpicklingError: If the pickle names anything else.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Look ``name`` up among what is allowed."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return ALLOWED[module, name]


def read_arrays(path: Path) -> Any:
    """Read a pickle, also one of Python 2, whose texts are read as bytes.

    Raises:
        DataError: If it is no pickle, or holds anything but plain values and NumPy arrays.
    """
    try:
        with path.open("rb") as file:
            return ArrayUnpickler(file, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: expected a pickle of NumPy arrays, as CIFAR-10's are, and it was not read: {reason}"
        ) from error
