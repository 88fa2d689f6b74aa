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

FORMAT = 1
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
    """

    summary: str = ""
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    classes: list[ClassCount] = field(default_factory=list)
    ann_file: str = ""
    as_annotated: bool = False
    with_masks: bool = False


def cache_folder() -> Path:
    """A folder for this user's caches: ``condattn`` in $XDG_CACHE_HOME or ~/.cache, else below the temporary folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "condattn")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir(), f"condattn-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    return folder


def remember(settings: dict[str, Any], check: Callable[[], tuple[Findings, Iterable[str | Path]]]) -> Findings:
    """The findings of ``check``, from the cache if nothing that it read has changed.

    Of several processes the first checks, and the others wait for what it finds.

    Args:
        settings: All that the findings depend on, beside the files.
        check: Returns the findings, and the files and folders that they were taken from.
    """
    key = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True, default=str).encode()).hexdigest()
    try:
        path = cache_folder() / "data_checks" / f"{key[:32]}.json"
        path.parent.mkdir(exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    except OSError:  # a cache that cannot be written is no reason to stop
        return check()[0]
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
    except FileNotFoundError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns
