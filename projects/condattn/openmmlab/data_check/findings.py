"""What a check of data has found, and a cache of it: data that have not changed are not read twice."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...weights.atomic import write_whole

FORMAT = 2
"""Of the cache's files; another number makes every check run anew."""


@dataclass
class ClassCount:
    """How much of one class there is.

    Attributes:
        name: Of the class.
        count: Objects, or pixels of label maps.
        images: Number of images that show it.
        sizes: Objects below 32 x 32 pixels, up to 96 x 96, and above; empty for label maps.
        examples: Paths of a few images that show it.
    """

    name: str
    count: int
    images: int
    sizes: list[int] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """What a check of one data set has found.

    Attributes:
        summary: What is used, in one line.
        warnings: What is lost, changed or doubtful, a line each.
        errors: What cannot work, a line each.
        classes: How much of each class there is.
        ann_file: A repaired copy of the annotations, to be read in place of the file.
        as_annotated: Whether some images carry a rotation in their header that their annotations do not have, so that
            :class:`.orientation.LoadImageAsAnnotated` is to load them.
        with_masks: Whether masks are trained or evaluated.
        barren: Why there is nothing to learn from this data set alone; an error unless another one of its loader helps.
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
    """Folders for this user's caches: ``condattn`` in $XDG_CACHE_HOME or ~/.cache, then below the temporary folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [Path(home, "condattn").absolute(), Path(tempfile.gettempdir(), f"condattn-{os.getuid()}").absolute()]


def write_cached(name: str, write: Callable[[Path], object]) -> Path:
    """Write the file ``name`` into the first cache folder that takes it, unless one has it already; return its path.

    Raises:
        OSError: If none of them can be written.
    """
    paths = [folder / name for folder in cache_folders()]
    for path in paths:
        if os.path.isfile(path):
            return path
    for path in paths:
        try:
            write_whole(path, write, overwrite=True)
            return path
        except OSError as error:
            reason = error
    raise reason


def remember(settings: dict[str, Any], check: Callable[[], tuple[Findings, Iterable[str | Path]]]) -> Findings:
    """The findings of ``check``, from the cache if nothing that it read has changed.

    Of several processes the first checks, and the others wait for what it finds.

    Args:
        settings: All that the findings depend on, beside the files.
        check: Returns the findings, and the files and folders that they were taken from.
    """
    here = os.path.abspath("")  # relative paths are of this folder
    key = hashlib.sha256(json.dumps([FORMAT, here, settings], sort_keys=True, default=str).encode()).hexdigest()
    for folder in cache_folders():
        path = folder / "data_checks" / f"{key[:32]}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            lock.acquire()
            break
        except (OSError, NotImplementedError):  # a folder that cannot be written, or has no locks
            continue
    else:
        return check()[0]  # a cache that cannot be written is no reason to stop
    try:
        if known := _read(path):
            return known
        findings, inputs = check()
        record = {"inputs": [[str(name), *_state(name)] for name in inputs], "findings": asdict(findings)}
        with suppress(OSError):
            write_whole(path, lambda partial: partial.write_text(json.dumps(record)), overwrite=True)
        return findings
    finally:
        lock.release()


def _read(path: Path) -> Findings | None:
    try:
        record = json.loads(path.read_text())
        if any(_state(name) != tuple(state) for name, *state in record["inputs"]):
            return None
        findings = Findings(**record["findings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    findings.classes = [ClassCount(**entry) for entry in record["findings"]["classes"]]
    return findings


def _state(path: str | Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return stat.st_size, stat.st_mtime_ns
