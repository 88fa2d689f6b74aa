"""The data of a study's runs: one folder in the repository, small enough to be committed."""

import copy
import fcntl
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ...weights.atomic import write_whole
from ..errors import UserError
from .plan import FINAL, RunId, Scores, Study

FINISHED, FAILED = "finished", "failed"
PACKAGES = (
    *("torch", "torchvision", "numpy", "timm", "onedl-mmengine", "onedl-mmcv", "onedl-mmdetection"),
    *(
        "onedl-mmsegmentation",
        "onedl-mmpretrain",
        "mmengine",
        "mmcv",
        "mmcv-lite",
        "mmdet",
        "mmsegmentation",
        "mmpretrain",
    ),
)


@dataclass(frozen=True)
class Record:
    """What is kept of a run.

    Attributes:
        run: Which.
        status: ``FINISHED``, or ``FAILED`` where the loss did not stay finite.
        score: At the last iteration, on the data that tune; of a failed run the last one before it failed, or 0.
        reported: Scores by name on the data that are reported, once, at the end; empty but for final runs.
        curve: (iteration, score on the data that tune) of each evaluation.
        spectra: Quantity -> (iteration, median over the attention sites).
        error: Why a run failed.
        commit: Of the code.
        versions: Package -> version.
    """

    run: RunId
    status: str
    score: float
    reported: dict[str, float]
    curve: list[list[float]]
    spectra: dict[str, list[list[float]]] = field(default_factory=dict)
    error: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def same_results(self, other: "Record") -> bool:
        """Whether ``other`` is bit for bit the same run."""
        names = ("run", "status", "score", "reported", "curve")
        return all(getattr(self, name) == getattr(other, name) for name in names)


def versions() -> dict[str, str]:
    """What a run's numbers depend on besides the code."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Results:
    """The folder ``results/STUDY``: ``study.json`` (definition, commit) and ``runs.jsonl`` (a line a run).

    Args:
        study: Whose results.
        root: The repository.
        pilot: Those of the pilot, which lie in a folder of their own: after a pilot a study may still be changed.
    """

    def __init__(self, study: Study, root: Path, pilot: bool = False) -> None:
        name = f"{study.name}_pilot" if pilot else study.name
        self.study, self.folder = study, root / "results" / name
        self.work = root / "work_dirs" / "studies" / name
        self._lock = self.work / "lock"
        self._snapshot: dict[RunId, Record] | None = None

    def snapshot(self) -> "Results":
        """These results as they are now, read once; for reports, which look at them often."""
        results = copy.copy(self)
        results._snapshot = self.records()
        return results

    @property
    def started(self) -> bool:
        """Whether the study has begun."""
        return (self.folder / "study.json").is_file()

    def header(self) -> dict[str, Any]:
        """Content of ``study.json``.

        Raises:
            UserError: If there is none, or it is of another study.
        """
        path = self.folder / "study.json"
        if not path.is_file():
            raise UserError(f"no results of this study in {self.folder}; run it without --report-only first")
        header = _parse(path.read_text(), path)
        if header.get("digest") != self.study.digest():
            raise UserError(
                f"{path} was written by another study (definition {header.get('digest')}, that of {self.study.path} is "
                f"{self.study.digest()}); a study that has begun is not changed: restore its file, or start a new one "
                "under another name"
            )
        return header

    def write_header(self, **values: Any) -> None:
        """Write or change ``study.json``."""
        path = self.folder / "study.json"
        header = _parse(path.read_text(), path) if path.is_file() else {}
        header |= {"digest": self.study.digest(), "definition": self.study.definition(), **values}
        text = json.dumps(header, indent=1, sort_keys=True) + "\n"
        write_whole(path, lambda part: part.write_text(text), overwrite=True)

    def records(self) -> dict[RunId, Record]:
        """All runs that are finished or failed.

        Raises:
            UserError: If a line cannot be read.
        """
        if self._snapshot is not None:
            return self._snapshot
        path = self.folder / "runs.jsonl"
        found = {}
        for line in path.read_text().splitlines() if path.is_file() else ():
            values = _parse(line, path)
            try:
                record = Record(**{**values, "run": RunId(**values["run"])})
            except (KeyError, TypeError) as error:
                raise UserError(f"{path}: a line is not the record of a run ({error}): {line[:80]}") from error
            found[record.run] = record
        return found

    def scores(self) -> Scores:
        """Run -> score on the data that tune."""
        return {run: record.score for run, record in self.records().items()}

    def add(self, record: Record) -> None:
        """Add a run; safe beside other processes, and the file is never half-written."""
        with self.locked():
            records = self.records() | {record.run: record}
            lines = [json.dumps(asdict(records[run]), sort_keys=True) for run in sorted(records)]
            write_whole(
                self.folder / "runs.jsonl", lambda part: part.write_text("\n".join(lines) + "\n"), overwrite=True
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing."""
        self.work.mkdir(parents=True, exist_ok=True)
        with self._lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def final(self, variant: str) -> list[Record]:
        """The final runs of a variant, in the order of the study's seeds."""
        records = {run.seed: r for run, r in self.records().items() if (run.stage, run.variant) == (FINAL, variant)}
        return [records[seed] for seed in self.study.seeds if seed in records]


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); restore it from the repository's history") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
