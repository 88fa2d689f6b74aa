"""The findings of a data check, and a cache of them, so that unchanged data are not read twice."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import PIL
from filelock import FileLock

from ...weights.atomic import write_atomically


@dataclass
class ClassCount:
    """The amount of data of one class.

    Attributes:
        name: Name of the class.
        count: Number of objects, or of pixels in label maps.
        images: Number of images that show it.
        sizes: Number of objects with areas below 32 x 32 pixels, up to 96 x 96, and above; empty for label maps.
        examples: Paths of a few images that show it.
    """

    name: str
    count: int
    images: int
    sizes: list[int] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """The findings of the check of one data set.

    Attributes:
        summary: What is used, in one line.
        warnings: What is left out, changed or doubtful, one line each.
        errors: What makes the data unusable, one line each.
        classes: The amount of data of each class.
        ann_file: Path of a repaired copy of the annotation file, to be read in its place; empty if there is none.
        as_annotated: Whether some images have a rotation in their header that their annotations do not have, so that
            :class:`.orientation.LoadImageAsAnnotated` must load them.
        with_masks: Whether masks are used for training or evaluation.
        barren: Why nothing can be learned from this data set alone; an error unless the loader has others that suffice.
    """

    summary: str = ""
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    classes: list[ClassCount] = field(default_factory=list)
    ann_file: str = ""
    as_annotated: bool = False
    with_masks: bool = False
    barren: str = ""


def cache_folders() -> list[Path]:
    """Cache folders of this user, the preferred first: in $XDG_CACHE_HOME or ~/.cache, and in the temporary folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [Path(home, "condattn").absolute(), Path(tempfile.gettempdir(), f"condattn-{os.getuid()}").absolute()]


def write_cached(name: str, write: Callable[[Path], object]) -> Path:
    """Write the file ``name`` into the first writable cache folder, unless one has it already; return its path.

    Raises:
        OSError: If no cache folder can be written.
    """
    paths = [folder / name for folder in cache_folders()]
    for path in filter(os.path.isfile, paths):
        return path
    for path in paths:
        try:
            write_atomically(path, write, overwrite=True)
            return path
        except OSError as error:
            reason = error
    raise reason


def remember(check: Callable[[Any], tuple[Findings, Iterable[str]]], use: Any) -> Findings:
    """Return the findings of ``check``, from the cache if no file or folder that it read has changed.

    Errors are not cached, since their reason may lie outside the files (permissions, a disk that was not mounted). If
    several processes call it, one runs the check, and the others wait for its findings.

    Args:
        check: Returns the findings, and the files and folders that were read.
        use: Its argument, a dataclass with everything that the findings depend on besides the files.
    """
    here = os.path.abspath("")  # relative paths depend on the working directory
    settings = [_version(), here, type(use).__name__, asdict(use)]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    for folder in cache_folders():
        path = folder / "data_checks" / f"{key[:32]}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            lock.acquire()
            break
        except (OSError, NotImplementedError):  # the folder is not writable, or does not support locks
            continue
    else:
        return check(use)[0]  # without a writable cache, check without caching
    try:
        if known := _read(path):
            return known
        findings, inputs = check(use)
        if findings.errors:
            return findings
        record = {"inputs": [[name, *_state(name)] for name in inputs], "findings": asdict(findings)}
        with suppress(OSError):
            write_atomically(path, lambda partial: partial.write_text(json.dumps(record)), overwrite=True)
        return findings
    finally:
        lock.release()


@cache
def _version() -> str:
    """Identifies the code of the data check and the libraries that decode images, on which findings depend."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    return f"{code.hexdigest()} {cv2.__version__} {PIL.__version__}"


def _read(path: Path) -> Findings | None:
    """The findings cached in ``path``; None if there are none, or a file that they depend on has changed."""
    try:
        record = json.loads(path.read_text())
        classes = [ClassCount(**entry) for entry in record["findings"].pop("classes")]
        findings = Findings(**record["findings"], classes=classes)
        return findings if all(_state(name) == tuple(state) for name, *state in record["inputs"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _state(path: str | Path) -> tuple[int, int, int]:
    """Size, modification time and change time (ns) of a file, by which a change is detected; -1 if it is not there.

    Permissions change the last alone.
    """
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return -1, -1, -1
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
