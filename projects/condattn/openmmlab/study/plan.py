"""What a study compares, read from its file and checked, and which runs it still needs."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ...engine.errors import UserError

PILOT, TUNING, FINAL = "pilot", "tuning", "final"
LARGEST_GRID = 7
"""A grid of learning rates that has grown to this size grows no further."""
KEYS = {
    *("config", "title", "data", "variants", "baseline", "metric", "factor", "unit", "difference", "families"),
    *("seeds", "tuning", "pilot_seeds", "evaluations", "sizes", "options"),
}


@dataclass(frozen=True, order=True)
class RunId:
    """One training.

    Attributes:
        stage: ``PILOT``, ``TUNING`` or ``FINAL``.
        variant: Name of the variant.
        seed: Seed of the training.
        rate: Learning rate; in the final stage it follows from the tuning.
    """

    stage: str
    variant: str
    seed: int
    rate: float

    def __str__(self) -> str:
        return f"{self.stage}/{self.variant}/{self.seed}/{self.rate:g}"


@dataclass(frozen=True)
class Study:
    """A study, as its file and the chosen size define it.

    Attributes:
        name: Name of the file, with the size behind it unless that is the first one of the file.
        path: The file.
        title: What is asked.
        config: Configuration file of the training.
        options: Changes to it that hold for every run.
        data: Environment variable with the folder of the data, its default, and where they come from; or empty.
        variants: Name -> changes to the configuration.
        baseline: The variant that the others are measured by.
        metric: Name of the score, as the evaluator reports it.
        factor: What it is multiplied by in reports.
        unit: What it is then counted in.
        difference: The size of difference that matters, in ``unit``.
        families: Name -> pairs of variants (one, its reference) whose tests are corrected together.
        seeds: Of the final runs.
        tuning_seeds: Of the runs that choose the learning rate.
        pilot_seeds: Of the runs that fix the length of training.
        rate: Option that is the learning rate.
        grid: Learning rates that are tried, ascending.
        evaluations: Number of evaluations in a training, evenly spaced.
    """

    name: str
    path: Path
    title: str
    config: Path
    options: dict[str, Any]
    data: dict[str, str]
    variants: dict[str, dict[str, Any]]
    baseline: str
    metric: str
    factor: float
    unit: str
    difference: float
    families: dict[str, list[tuple[str, str]]]
    seeds: list[int]
    tuning_seeds: list[int]
    pilot_seeds: list[int]
    rate: str
    grid: list[float]
    evaluations: int = field(default=10)

    def definition(self) -> dict[str, Any]:
        """All that was decided beforehand, as plain JSON values."""
        names = ("title", "options", "variants", "baseline", "metric", "factor", "unit", "difference", "families")
        numbers = ("seeds", "tuning_seeds", "pilot_seeds", "rate", "grid", "evaluations")
        definition = {name: getattr(self, name) for name in (*names, *numbers)}
        return json.loads(json.dumps({"config": self.config.name, **definition}))

    def digest(self) -> str:
        """Identifies :meth:`definition`."""
        return hashlib.sha256(json.dumps(self.definition(), sort_keys=True).encode()).hexdigest()[:16]


def load_study(path: str, size: str | None = None) -> Study:
    """Read a study's file.

    Args:
        path: A configuration file in mmengine's format with the settings of :class:`Study`.
        size: One of its ``sizes``; default: the first.

    Raises:
        UserError: If a setting is missing, unknown or contradicts another.
    """
    if not Path(path).is_file():
        raise UserError(f"no study file {path}; the ones of this project are in configs/studies/")
    try:
        settings = Config.fromfile(path).to_dict()
    except (SyntaxError, ImportError, FileNotFoundError, TypeError) as error:
        raise UserError(f"cannot read the study {path}: {error}") from error
    if unknown := settings.keys() - KEYS:
        raise UserError(
            f"{path}: unknown settings {', '.join(sorted(unknown))}; expected some of {', '.join(sorted(KEYS))}"
        )
    needed = KEYS - {"data", "options", "sizes", "evaluations", "factor"}
    if missing := needed - settings.keys():
        raise UserError(f"{path}: a study needs {', '.join(sorted(missing))}")
    sizes = settings.get("sizes") or {"": {}}
    size = next(iter(sizes)) if size is None else size
    if size not in sizes:
        raise UserError(f"{path} has no size {size!r}; it has {', '.join(map(repr, sizes))}")
    tuning = settings["tuning"]
    study = Study(
        name=Path(path).stem + ("" if size == next(iter(sizes)) else f"_{size}"),
        path=Path(path),
        title=settings["title"],
        config=Path(path).parent / settings["config"],
        options={**settings.get("options", {}), **sizes[size]},
        data=settings.get("data", {}),
        variants=settings["variants"],
        baseline=settings["baseline"],
        metric=settings["metric"],
        factor=settings.get("factor", 1.0),
        unit=settings["unit"],
        difference=settings["difference"],
        families={name: [tuple(pair) for pair in pairs] for name, pairs in settings["families"].items()},
        seeds=list(settings["seeds"]),
        tuning_seeds=list(tuning["seeds"]),
        pilot_seeds=list(settings["pilot_seeds"]),
        rate=tuning["option"],
        grid=sorted(tuning["grid"]),
        evaluations=settings.get("evaluations", 10),
    )
    _check(study)
    return study


def _check(study: Study) -> None:
    where = study.path
    if not study.config.is_file():
        raise UserError(f"{where}: no configuration {study.config}")
    named = {"baseline": [study.baseline]}
    named |= {f"families.{family}": [n for pair in pairs for n in pair] for family, pairs in study.families.items()}
    for place, names in named.items():
        if unknown := [name for name in names if name not in study.variants]:
            raise UserError(f"{where}: {place} names {', '.join(unknown)}; variants are {', '.join(study.variants)}")
    for name in study.variants:
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"{where}: expected letters, digits and _ . + - in the name of a variant, got {name!r}")
    groups = {"seeds": study.seeds, "tuning.seeds": study.tuning_seeds, "pilot_seeds": study.pilot_seeds}
    for place, seeds in groups.items():
        if not seeds:
            raise UserError(f"{where}: {place} is empty; a study needs two or more")
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{where}: {place} has a seed twice: {seeds}")
    if len(study.seeds) < 2:
        raise UserError(f"{where}: expected two or more seeds, got {study.seeds}; one seed has no spread")
    for (one, seeds), (other, others) in combinations(groups.items(), 2):
        if common := set(seeds) & set(others):
            raise UserError(f"{where}: {one} and {other} share {sorted(common)}; each seed is used for one purpose")
    if len(study.grid) < 2 or study.grid[0] <= 0:
        raise UserError(f"{where}: expected two or more positive learning rates in tuning.grid, got {study.grid}")
    if study.difference <= 0:
        raise UserError(f"{where}: expected a positive difference, got {study.difference}")


Scores = Mapping[RunId, float]
"""Finished runs -> their final score on the data that tune."""


def pilot_runs(study: Study) -> list[RunId]:
    """The baseline at the middle rate of the grid."""
    rate = study.grid[len(study.grid) // 2]
    return [RunId(PILOT, study.baseline, seed, rate) for seed in study.pilot_seeds]


def mean_scores(study: Study, scores: Scores, variant: str, grid: Sequence[float]) -> list[float] | None:
    """Mean score over the tuning seeds at each rate; None while a run is missing."""
    found = []
    for rate in grid:
        values = [scores.get(RunId(TUNING, variant, seed, rate)) for seed in study.tuning_seeds]
        if None in values:
            return None
        found.append(sum(values) / len(values))
    return found


def current_grid(study: Study, scores: Scores) -> list[float]:
    """The rates that every variant is tried at: those of the file, and more where a best one lies at an end.

    The grid grows by its own ratio, for all variants at once, when all of its runs are finished.
    """
    grid = list(study.grid)
    while len(grid) < LARGEST_GRID:
        best = []
        for variant in study.variants:
            means = mean_scores(study, scores, variant, grid)
            if means is None:
                return grid
            best.append(max(range(len(grid)), key=means.__getitem__))
        longer = [float(f"{grid[0] ** 2 / grid[1]:.6g}")] if 0 in best else []
        longer += grid
        longer += [float(f"{grid[-1] ** 2 / grid[-2]:.6g}")] if len(grid) - 1 in best else []
        if len(longer) == len(grid):
            break
        grid = longer
    return grid


def chosen_rates(study: Study, scores: Scores) -> dict[str, float] | None:
    """Variant -> the rate with the best mean score; None before the tuning of all is complete."""
    grid = current_grid(study, scores)
    chosen = {}
    for variant in study.variants:
        means = mean_scores(study, scores, variant, grid)
        if means is None:
            return None
        chosen[variant] = grid[max(range(len(grid)), key=means.__getitem__)]
    return chosen


def planned_runs(study: Study, scores: Scores) -> list[RunId]:
    """The runs that are known to be needed now: those of the grid, or all once the rates are chosen."""
    grid = current_grid(study, scores)
    runs = [
        RunId(TUNING, variant, seed, rate) for seed in study.tuning_seeds for rate in grid for variant in study.variants
    ]
    if rates := chosen_rates(study, scores):
        runs += [RunId(FINAL, variant, seed, rates[variant]) for seed in study.seeds for variant in study.variants]
    return runs


def missing_runs(study: Study, scores: Scores, only: Iterable[str] = ()) -> list[RunId]:
    """The planned runs that are not finished, of the variants ``only`` if any are named."""
    wanted = set(only) or set(study.variants)
    return [run for run in planned_runs(study, scores) if run not in scores and run.variant in wanted]
