"""Write a file completely or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | Path, write: Callable[[Path], None], overwrite: bool = False) -> None:
    """Write a file under a temporary name beside it, and give it its name when it is whole and on the disk.

    Args:
        path: The file.
        write: Writes to the path that it is given.
        overwrite: Whether a file of that name may be replaced.

    Raises:
        FileExistsError: If there is one and it may not.
        OSError: If the file cannot be written; nothing is left of it then.
    """
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; choose another name, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
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
    except RuntimeError as error:  # torch's writer, of a full disk
        raise OSError(f"{path} could not be written: {' '.join(str(error).split())[:160]}") from error
    finally:
        part.unlink(missing_ok=True)
