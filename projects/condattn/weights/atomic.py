"""Write files atomically."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | Path, write: Callable[[Path], None], overwrite: bool = False) -> None:
    """Write a file atomically: under a temporary name beside it, and renamed when it is complete and on the disk.

    Args:
        path: The file.
        write: Writes the file to the path that it is given.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: If the file exists and ``overwrite`` is False.
        OSError: If the file cannot be written; no part of it is left then.
    """
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; choose another name, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    beginning = path.name.encode()[:100].decode(errors="ignore")  # a name must not become longer than 255 bytes
    handle, name = tempfile.mkstemp(prefix=f".{beginning}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(path)
    except RuntimeError as error:  # raised by torch's writer if the disk is full
        raise OSError(f"{path} could not be written: {' '.join(str(error).split())[:160]}") from error
    finally:
        part.unlink(missing_ok=True)
