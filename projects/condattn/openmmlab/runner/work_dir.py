"""Keep two trainings from writing to one work directory at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from mmengine.config import Config

from ..errors import UserError
from ..processes import rank

PATIENCE = 20.0
"""Seconds to wait for another training to end: the worker processes of one that was killed end within them."""


@contextmanager
def reserved(cfg: Config) -> Iterator[None]:
    """Keep other trainings out of ``cfg.work_dir``; of a distributed training, the first process does so.

    Without effect where the file system supports no locks.

    Args:
        cfg: The configuration of the training.

    Raises:
        UserError: If another training is running there.
    """
    folder = Path(cfg.work_dir)
    if rank(cfg.launcher) > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".training.lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise UserError(f"another training is running in {folder}; let it end, or choose another --work-dir") from error
    except (OSError, NotImplementedError):  # no locks, or a folder that is not writable, which the runner will say
        pass
    try:
        yield
    finally:
        lock.release()
