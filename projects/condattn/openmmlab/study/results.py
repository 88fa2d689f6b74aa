"""Storage of a study's results: one folder in the repository, small enough to be committed."""

import copy
import fcntl
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...stack import describe_operators
from ...weights.atomic import write_atomically
from ..errors import UserError
from .plan import FINAL, RunId, Scores, Study, chosen_rates

FINISHED, FAILED = "finished", "failed"
PACKAGES = (
    *("torch", "torchvision", "numpy", "timm", "transformers", "scipy", "scikit-learn", "scikit-image"),
    *("pillow", "opencv-python", "opencv-python-headless", "pycocotools"),
    *("onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation", "onedl-mmpretrain"),
    *("mmengine", "mmcv", "mmcv-lite", "mmdet", "mmsegmentation", "mmpretrain"),
)
"""Packages on which the numbers of runs may depend."""


@dataclass(frozen=True)
class Record:
    """Result of a run, one line of ``runs.jsonl``.

    Attributes:
        run: Identifier of the run.
        status: ``FINISHED``, or ``FAILED`` if the loss became non-finite.
        score: Score at the last iteration, on the tuning data; for a failed run, the last score before it failed, or 0.
        reported: Name -> score in the final evaluation after the last iteration; empty except for final runs.
        curve: (iteration, score on the tuning data) of each evaluation.
        spectra: Quantity -> list of (iteration, median over the attention sites).
        error: Why the run failed; empty if it finished.
        commit: Commit of the code that ran.
        versions: What :func:`versions` returned when the run began.
        training: Hash of the training's configuration; empty in early records of studies that start from checkpoints.
        origin: Name of the study that executed the run; empty if it was this one.
        start: Hash of the weights that the training started from; empty if there was no checkpoint.
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
    training: str = ""
    origin: str = ""
    start: str = ""

    def curve_over(self, steps: Sequence[float]) -> list[tuple[float, float]]:
        """The curve at ``steps``; a failed run keeps its last score, 0 if it has none, until the end."""
        scores, last, found = dict(self.curve), 0.0, []
        for step in steps:
            last = scores.get(step, last)
            if step in scores or self.status == FAILED:
                found.append((step, last))
        return found

    def same_results(self, other: "Record") -> bool:
        """Whether ``other`` is the same run with results that are equal bit for bit."""
        names = ("run", "status", "score", "reported", "curve")
        return all(getattr(self, name) == getattr(other, name) for name in names)


def versions() -> dict[str, str]:
    """What a run's numbers depend on beside the code: versions of Python and of the packages, and the processor.

    Returns:
        Package -> version; 'cpu' -> instructions that PyTorch uses, such as 'AVX2'; 'operators' -> whose operators mmcv
        uses; 'gpu' -> name of the GPU, if there is one.
    """
    found = {
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "operators": describe_operators(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def same_versions(recorded: dict[str, str]) -> bool:
    """Whether what :func:`versions` returned for a record is so now, as far as the record says."""
    present = versions()
    return recorded == {name: value for name, value in present.items() if name in recorded or name == "gpu"}


def same_data(one: str | None, other: str | None) -> bool:
    """Whether two hashes of data are equal; early ones have the names and sizes of the samples alone, as a prefix."""
    return bool(one and other) and (one.startswith(other) or other.startswith(one))


class Results:
    """The folder ``results/STUDY``: ``study.json`` (definition, commit) and ``runs.jsonl`` (one line for each run).

    Args:
        study: The study.
        root: Folder of the repository.
        pilot: Whether these are the results of the pilot. They have a separate folder, because a study may still be
            changed after its pilot.
    """

    def __init__(self, study: Study, root: Path, pilot: bool = False) -> None:
        name = f"{study.name}_pilot" if pilot else study.name
        self.study, self.pilot, self.folder = study, pilot, root / "results" / name
        self.work = root / "work_dirs" / "studies" / name
        self._lock = self.work / "lock"
        self._snapshot: dict[RunId, Record] | None = None

    def snapshot(self) -> "Results":
        """A copy of these results whose records are read once, now; for reports, which read them often."""
        results = copy.copy(self)
        results._snapshot = self.records()
        return results

    @property
    def started(self) -> bool:
        """Whether the study has begun."""
        return (self.folder / "study.json").is_file()

    def same_study(self) -> bool:
        """Whether ``study.json`` was written for this definition of the study."""
        path = self.folder / "study.json"
        return _parse(path.read_text(), path).get("digest") == self.study.digest()

    def header(self) -> dict[str, Any]:
        """Content of ``study.json``.

        Raises:
            UserError: If there is no such file, or it was written for another definition of the study.
        """
        path = self.folder / "study.json"
        if not path.is_file():
            raise UserError(f"no results of this study in {self.folder}; it has not begun: run it first, or --list it")
        header = _parse(path.read_text(), path)
        if header.get("digest") != self.study.digest():
            raise UserError(
                f"{path} was written by another study (definition {header.get('digest')}, that of {self.study.path} is "
                f"{self.study.digest()}); a study that has begun is not changed: restore its file, or start a new one "
                "under another name"
            )
        return header

    def write_header(self, **values: Any) -> None:
        """Write ``study.json``, or update ``values`` in it."""
        path = self.folder / "study.json"
        header = _parse(path.read_text(), path) if path.is_file() else {}
        header |= {"digest": self.study.digest(), "definition": self.study.definition(), **values}
        text = json.dumps(header, indent=1, sort_keys=True) + "\n"
        write_atomically(path, lambda part: part.write_text(text), overwrite=True)

    def records(self) -> dict[RunId, Record]:
        """Records of all runs that have finished or failed.

        Raises:
            UserError: If a line cannot be read.
        """
        return _read(self.folder / "runs.jsonl") if self._snapshot is None else self._snapshot

    def find_elsewhere(self, run: RunId, trainings: Sequence[str], commit: str) -> Record | None:
        """A record for ``run`` of the same training in another study, with equal code, packages and data, or None.

        Args:
            run: The run.
            trainings: Hashes that the training may have in records.
            commit: Commit of the code.
        """
        data = self._data_of(self.folder)
        for path in sorted(self.folder.parent.glob("*/runs.jsonl")):
            if path.parent == self.folder or not same_data(self._data_of(path.parent), data):
                continue
            for record in _read(path).values():
                equal = record.training in trainings and (record.run.stage, record.commit) == (run.stage, commit)
                if equal and same_versions(record.versions):
                    return replace(record, run=run, training=trainings[0], origin=record.origin or path.parent.name)
        return None

    @staticmethod
    def _data_of(folder: Path) -> str | None:
        """Hash of the data with which the study in ``folder`` began; None if it is not known."""
        path = folder / "study.json"
        return _parse(path.read_text(), path).get("data") if path.is_file() else None

    def scores(self) -> Scores:
        """Run -> last score on the tuning data."""
        return {run: record.score for run, record in self.records().items()}

    def add(self, record: Record) -> None:
        """Add the record of a run. Several processes may do so at once, and the file is never partially written."""
        with self.locked():
            records = self.records() | {record.run: record}
            lines = [json.dumps(asdict(records[run]), sort_keys=True) for run in sorted(records)]
            write_atomically(
                self.folder / "runs.jsonl", lambda part: part.write_text("\n".join(lines) + "\n"), overwrite=True
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that keeps other processes from writing."""
        self.work.mkdir(parents=True, exist_ok=True)
        with self._lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def final(self, variant: str) -> list[Record]:
        """Records of the final runs of a variant with its chosen rate, in the order of the study's seeds."""
        every = self.records()
        wanted = (FINAL, variant, (chosen_rates(self.study, self.scores()) or {}).get(variant))
        records = {run.seed: record for run, record in every.items() if (run.stage, run.variant, run.rate) == wanted}
        return [records[seed] for seed in self.study.seeds if seed in records]


def _read(path: Path) -> dict[RunId, Record]:
    """Read the records in ``path``, which are none if the file is missing."""
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        values = _parse(line, path)
        try:
            record = Record(**{**values, "run": RunId(**values["run"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: a line is not the record of a run ({error}): {line[:80]}") from error
        found[record.run] = record
    return found


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); restore it from the repository's history") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
