"""Read files of weights without executing code from them."""

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from filelock import FileLock
from torch import Tensor

from ..wording import some

# Entries of a file that may hold the weights, and prefixes of their names. Averages come first, as in timm's loader.
# However, mmengine's EMAHook saves the average in state_dict, and the weights that were averaged in ema_state_dict.
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "model_state", "ema_state_dict", "ema")
PREFIXES = ("module.", "model.", "backbone.", "encoder.")
# The start of a SHA-256 at the end of a file name. A date there is not taken for one.
NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|bin|safetensors)$")
DATE = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{4}|\d{6})?")


class BadFileError(ValueError):
    """Raised if a file is not as expected; the message describes what it is, in one line."""


class DamagedFileError(BadFileError):
    """Raised if a file is empty, cut short, or of another kind."""


class MissingFileError(BadFileError, FileNotFoundError):
    """Raised if a file does not exist."""


class FolderError(BadFileError, IsADirectoryError):
    """Raised if a folder is found where a file is expected."""


class UnreadableFileError(BadFileError, PermissionError):
    """Raised if the permissions do not allow reading a file."""


class DownloadError(BadFileError, OSError):
    """Raised if a file cannot be downloaded from its address."""


def read_file(path: str | Path, unsafe: bool = False) -> Any:
    """Read a file of torch (.pth, .pt, .bin) or safetensors to the CPU, mapped into memory if possible.

    Args:
        path: The file, or its address (http or https), from which it is downloaded once into torch's cache.
        unsafe: Unpickle everything, which executes any code in the file. Otherwise only tensors, plain data, and the
            classes that mmengine's runner saves are read.

    Raises:
        BadFileError: If the file cannot be read; it is also an ``OSError`` where ``open`` would raise one.
    """
    if str(path).startswith(("http://", "https://")):
        return _read_download(str(path), unsafe)
    path = Path(path).expanduser()
    if not path.exists():
        raise MissingFileError(f"there is no file {path}")
    if path.is_dir():
        raise FolderError(f"{path} is a folder; expected a file")
    try:
        size = path.stat().st_size
        if not size:
            raise DamagedFileError(f"{path} is empty")
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _read_torch(path, unsafe)
    except PermissionError as error:
        raise UnreadableFileError(f"{path} may not be read: {error.strerror}") from error
    except (EOFError, OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if isinstance(error, BadFileError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise DamagedFileError(
            f"{path} ({size:,} bytes) is no file of weights, or cut short: copy or download it again "
            f"({type(error).__name__}: {reason})"
        ) from error


def _read_download(address: str, unsafe: bool) -> Any:
    path = _downloaded(address)
    try:
        return read_file(path, unsafe)
    except BadFileError as error:
        if isinstance(error, DamagedFileError):
            path.unlink(missing_ok=True)  # otherwise the next run would read it again
        raise type(error)(f"{address}: {error}") from error


def _downloaded(address: str) -> Path:
    name = Path(urlparse(address).path).name
    path = Path(torch.hub.get_dir(), "checkpoints", f"{hashlib.sha256(address.encode()).hexdigest()[:8]}-{name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # only one of several processes downloads
        if not path.exists():
            try:
                torch.hub.download_url_to_file(address, str(path))
            except OSError as error:
                raise DownloadError(f"{address} cannot be downloaded; is there a network? ({error})") from error
    return path


def describe_wrong_hash(path: str | Path) -> str:
    """Describe how the SHA-256 of a file differs from the one in its name; return '' if it does not.

    Names of published files end with the start of their SHA-256, as in ``swin-0a1b2c3d.pth``; a date is not taken for
    one.

    Args:
        path: The file, or the address that it was downloaded from.
    """
    named = NAMED_HASH.search(Path(urlparse(str(path)).path).name)
    if not named or DATE.fullmatch(named[1]):
        return ""
    file = _downloaded(str(path)) if str(path).startswith(("http://", "https://")) else Path(path).expanduser()
    if not file.is_file():
        return ""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    if (found := digest.hexdigest()[: len(named[1])]) == named[1]:
        return ""
    return f"{path} is another file than its name says: its SHA-256 starts with {found}, not with {named[1]}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise BadFileError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedFileError(
            f"{path} is no safetensors file, or cut short: copy or download it again ({error})"
        ) from error


def _read_torch(path: Path, unsafe: bool) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        with torch.serialization.safe_globals(_plain_data()):
            return torch.load(path, map_location="cpu", weights_only=not unsafe, mmap=zipped)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"(?:GLOBAL|function|class) ([\w.<>']+)", str(error))
        if foreign is None:
            raise DamagedFileError(f"{path} is no file of weights, or cut short: copy or download it again") from error
        raise BadFileError(
            f"{path} holds more than weights ({foreign[1]}), and reading it would execute its code; if you trust where "
            "it comes from, allow that with --unsafe of the tools, or in an init_cfg with unsafe=True"
        ) from error


def _plain_data() -> list[Any]:
    """Return the classes that mmengine's runner saves besides tensors: numpy numbers and the histories of its logs."""
    try:
        import numpy
        from numpy.dtypes import BoolDType, Float32DType, Float64DType, Int32DType, Int64DType, StrDType, UInt8DType
    except ImportError:
        return []
    core = numpy.core if numpy.__version__.startswith("1.") else numpy._core
    plain = [numpy.dtype, numpy.ndarray, core.multiarray.scalar, core.multiarray._reconstruct]
    plain += [BoolDType, Float32DType, Float64DType, Int32DType, Int64DType, StrDType, UInt8DType]
    try:
        from mmengine.logging.history_buffer import HistoryBuffer
    except ImportError:
        return plain

    def statistic(cls: type, name: str) -> object:
        if cls is not HistoryBuffer or name not in ("min", "max", "current", "mean", "statistics"):
            raise pickle.UnpicklingError(f"GLOBAL getattr({cls!r}, {name!r}) is not allowed")
        return getattr(cls, name)

    # Its methods are pickled as getattr(HistoryBuffer, name). The real getattr would allow any code.
    statistic.__module__, statistic.__name__, statistic.__qualname__ = "builtins", "getattr", "getattr"
    return [*plain, HistoryBuffer, statistic]


def weights_of(
    content: Any, path: str | Path = "the file", prefix: str = ""
) -> tuple[dict[str, Tensor], list[str], str]:
    """Extract the weights from the content of a file, without wrappers and common prefixes.

    Args:
        content: What :func:`read_file` returned.
        path: The file, for messages.
        prefix: Only weights whose names begin with it are taken, without it. A dot is added at its end.

    Returns:
        Names and tensors; the names of tensors outside the backbone; and a text that says where the weights were.

    Raises:
        BadFileError: If there are no weights.
    """
    entries: list[str] = []
    while isinstance(content, Mapping):
        # Training scripts may save other tensors beside the weights, such as the best accuracy.
        entry = next((name for name in ENTRIES if isinstance(content.get(name), Mapping) and content[name]), None)
        if entry is None:
            break
        entries.append(entry)
        content = content[entry]
    if not isinstance(content, Mapping):
        raise BadFileError(f"{path} holds a {type(content).__name__}; expected a dictionary of weights")
    weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise BadFileError(f"{path} holds no weights; its entries are {some(content) or 'nothing'}")
    beside: list[str] = []
    if prefix:
        prefix = f"{prefix.rstrip('.')}."
        inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if not inside:
            raise BadFileError(f"{path} has no weights with the prefix {prefix!r}; it has {some(weights)}")
        weights, beside = inside, [name for name in weights if not name.startswith(prefix)]
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            if inside and (prefix == "backbone." or len(inside) == len(weights)):
                beside += [name for name in weights if not name.startswith(prefix)]
                weights, stripped = inside, True
    return weights, beside, f"{path} ({'.'.join(entries)})" if entries else str(path)
