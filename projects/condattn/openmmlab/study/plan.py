"""What a study compares, read from its file and checked, and which runs it still needs."""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from mmengine.config import Config
from scipy.stats import chi2

from ..errors import UserError

PILOT, TUNING, FINAL = "pilot", "tuning", "final"
MARGIN = 2.0
"""Standard errors by which a variant's own best rate must be better than the common one to be taken."""
LARGEST_GRID = 7
"""A grid of learning rates that has grown to this size grows no further, unless the study says otherwise."""
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
        largest_grid: Number of rates at which the grid stops growing.
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
    largest_grid: int = LARGEST_GRID
    evaluations: int = 10

    def definition(self) -> dict[str, Any]:
        """All that was decided beforehand, as plain JSON values."""
        names = ("title", "options", "variants", "baseline", "metric", "factor", "unit", "difference", "families")
        numbers = ("seeds", "tuning_seeds", "pilot_seeds", "rate", "grid", "largest_grid", "evaluations")
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
        largest_grid=tuning.get("largest_grid", LARGEST_GRID),
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
    for place in ("seeds", "tuning.seeds"):
        if len(groups[place]) < 2:
            raise UserError(f"{where}: expected two or more {place}, got {groups[place]}; one seed has no spread")
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


def rates_on_grid(study: Study, scores: Scores, grid: Sequence[float]) -> dict[str, float] | None:
    """Variant -> its rate among those of ``grid``; None while a run is missing.

    All variants take the rate that is best for most: the one with the smallest median, over the variants, of the
    deficit to a variant's own best mean score. A variant whose own best is better by more than ``MARGIN`` standard
    errors takes that. Without this bar, variants that are equal would often get different rates by chance, and the
    difference between the rates would pass for one between the variants: in simulated families without any effect, one
    was found in up to 22 % of the cases in place of 5 %. What it costs: a variant whose best rate is another one, by
    less than the margin, is trained at a rate that is a little worse for it.
    """
    cells = {}
    for variant in study.variants:
        cells[variant] = [
            [scores.get(RunId(TUNING, variant, seed, rate)) for seed in study.tuning_seeds] for rate in grid
        ]
        if any(None in cell for cell in cells[variant]):
            return None
    means = {variant: [statistics.mean(cell) for cell in row] for variant, row in cells.items()}
    deficits = [statistics.median(row[i] - max(row) for row in means.values()) for i in range(len(grid))]
    common = _best(deficits)
    seeds = len(study.tuning_seeds)
    margin = MARGIN * _spread([cell for row in cells.values() for cell in row]) * math.sqrt(2 / seeds)
    chosen = {}
    for variant, row in means.items():
        own = _best(row)
        chosen[variant] = grid[own if row[own] - row[common] > margin else common]
    return chosen


def _best(scores: Sequence[float]) -> int:
    """Index of the largest score; of equal ones the nearest to the middle of the grid."""
    middle = (len(scores) - 1) / 2
    return max(range(len(scores)), key=lambda i: (scores[i], -abs(i - middle)))


def _spread(cells: Sequence[Sequence[float]]) -> float:
    """Standard deviation over seeds, by the median of the variances within cells, which diverged runs do not move."""
    degrees = len(cells[0]) - 1
    median = statistics.median(statistics.variance(cell) for cell in cells)
    return math.sqrt(median / (float(chi2.ppf(0.5, degrees)) / degrees))


def current_grid(study: Study, scores: Scores) -> list[float]:
    """The rates that every variant is tried at: those of the file, and more where a chosen one lies at an end.

    The grid grows by its own ratio, for all variants at once, when all of its runs are finished.
    """
    grid = list(study.grid)
    while len(grid) < study.largest_grid and (rates := rates_on_grid(study, scores, grid)):
        chosen = rates.values()
        longer = [float(f"{grid[0] ** 2 / grid[1]:.6g}")] if grid[0] in chosen else []
        longer += grid
        longer += [float(f"{grid[-1] ** 2 / grid[-2]:.6g}")] if grid[-1] in chosen else []
        if len(longer) == len(grid):
            break
        grid = longer
    return grid


def chosen_rates(study: Study, scores: Scores) -> dict[str, float] | None:
    """Variant -> its learning rate, see :func:`rates_on_grid`; None before the tuning of all is complete."""
    return rates_on_grid(study, scores, current_grid(study, scores))


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
