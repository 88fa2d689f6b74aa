"""The plan of a study: read and check its file, choose learning rates, and list the runs that are still missing."""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from mmengine.config import Config
from scipy.stats import chi2

from ..errors import UserError

PILOT, TUNING, FINAL = "pilot", "tuning", "final"
MARGIN = 2.0
"""A variant gets its own best rate only if it beats the common rate by more than this many standard errors."""
LARGEST_GRID = 7
"""Default for the number of learning rates at which the grid stops growing."""
SETTINGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("config", "title", "baseline", "metric", "unit"), (str,)),
    **dict.fromkeys(("data", "variants", "families", "tuning", "sizes", "options", "start"), (dict,)),
    **dict.fromkeys(("seeds", "pilot_seeds"), (list, tuple)),
    **dict.fromkeys(("factor", "difference"), (int, float)),
    "evaluations": (int,),
    "exploratory": (bool,),
}
"""Setting of a study's file -> its types."""
TUNING_SETTINGS: dict[str, tuple[type, ...]] = {
    "option": (str,),
    "grid": (list, tuple),
    "seeds": (list, tuple),
    "largest_grid": (int,),
}
"""The same for the setting ``tuning``."""


@dataclass(frozen=True, order=True)
class RunId:
    """Identifier of one training run.

    Attributes:
        stage: ``PILOT``, ``TUNING`` or ``FINAL``.
        variant: Name of the variant.
        seed: Seed of the training.
        rate: Learning rate; in the final stage it is the result of the tuning.
    """

    stage: str
    variant: str
    seed: int
    rate: float

    def __str__(self) -> str:
        return f"{self.stage}/{self.variant}/{self.seed}/{self.rate:g}"


@dataclass(frozen=True)
class Study:
    """A study, as defined by its file and the chosen size.

    Attributes:
        name: Stem of the file's name, with the size as a suffix unless it is the file's first size.
        path: The study's file.
        title: The question that the study asks.
        config: Configuration file of the training.
        options: Changes to the configuration for every run, option -> value.
        data: The environment variable with the data folder (``variable``), the default folder (``default``) and where
            to get the data (``source``); empty if the study needs no external data.
        variants: Name -> changes to the configuration, option -> value. A variant that sets the option of the learning
            rate is trained with that rate, and takes no part in the tuning.
        baseline: Name of the variant that serves as the baseline.
        metric: Name of the score, as the evaluator reports it.
        factor: Factor that converts the score to ``unit`` in reports.
        unit: Unit of the scores in reports.
        difference: Smallest difference that is considered relevant, in ``unit``.
        families: Name -> pairs (variant, its reference) whose tests are corrected together.
        seeds: Seeds of the final runs.
        tuning_seeds: Seeds of the runs that choose the learning rate; empty if the grid has a single rate.
        pilot_seeds: Seeds of the runs that determine the length of training.
        rate: Name of the option that sets the learning rate.
        grid: Learning rates to try, ascending.
        largest_grid: Number of rates at which the grid stops growing.
        evaluations: Number of evenly spaced evaluations in a training.
        start: The ``checkpoint`` that the training of a seed starts from, and the ``command`` that makes it. Both have
            ``{seed}`` in the place of the seed, and the checkpoint is relative to the repository. Options name it by
            the value ``"{start}"``. Empty if there is none.
        exploratory: Whether the study is left out of the estimate over all studies.
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
    start: dict[str, str] = field(default_factory=dict)
    exploratory: bool = False

    def definition(self) -> dict[str, Any]:
        """All settings that were decided before the first run, as plain JSON values."""
        names = ("title", "options", "variants", "baseline", "metric", "factor", "unit", "difference", "families")
        numbers = ("seeds", "tuning_seeds", "pilot_seeds", "rate", "grid", "largest_grid", "evaluations")
        optional = [name for name in ("start", "exploratory") if getattr(self, name)]
        definition = {name: getattr(self, name) for name in (*names, *numbers, *optional)}
        return json.loads(json.dumps({"config": self.config.name, **definition}))

    def digest(self) -> str:
        """Hash that identifies :meth:`definition`."""
        return short_hash(json.dumps(self.definition(), sort_keys=True).encode())


def short_hash(content: bytes) -> str:
    """The first 16 digits of the SHA-256 of ``content``."""
    return hashlib.sha256(content).hexdigest()[:16]


def load_study(path: str, size: str | None = None) -> Study:
    """Read a study's file.

    Args:
        path: A configuration file in mmengine's format with the settings of :class:`Study`.
        size: One of the ``sizes`` in the file; default: the first.

    Raises:
        UserError: If a setting is missing, unknown or contradicts another.
    """
    settings = _read(path)
    if unknown := settings.keys() - SETTINGS.keys():
        raise UserError(
            f"{path}: unknown settings {', '.join(sorted(unknown))}; expected some of {', '.join(sorted(SETTINGS))}"
        )
    needed = SETTINGS.keys() - {"data", "options", "sizes", "evaluations", "factor", "start", "exploratory"}
    if missing := needed - settings.keys():
        raise UserError(f"{path}: a study needs {', '.join(sorted(missing))}")
    _check_types(settings, SETTINGS, path)
    sizes = settings.get("sizes") or {"": {}}
    size = next(iter(sizes)) if size is None else size
    if size not in sizes:
        raise UserError(f"{path} has no size {size!r}; it has {', '.join(map(repr, sizes))}")
    tuning, families = settings["tuning"], settings["families"]
    if not {"option", "grid", "seeds"} <= tuning.keys() <= TUNING_SETTINGS.keys():
        raise UserError(f"{path}: expected tuning=dict(option=..., grid=[...], seeds=[...]), got {tuning}")
    _check_types(tuning, TUNING_SETTINGS, f"{path}: tuning")
    numbers = {"seeds": settings["seeds"], "pilot_seeds": settings["pilot_seeds"], "tuning.seeds": tuning["seeds"]}
    for place, seeds in numbers.items():
        if not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds):
            raise UserError(f"{path}: expected whole numbers from 0 to 2**32 - 1 as {place}, got {seeds}")
    if not all(_is_number(rate) for rate in tuning["grid"]):
        raise UserError(f"{path}: expected numbers in tuning.grid, got {tuning['grid']}")
    for place in ("variants", "sizes"):
        for name, options in settings.get(place, {}).items():
            if not isinstance(options, dict) or not all(isinstance(key, str) for key in (name, *options)):
                raise UserError(f"{path}: {place}: expected a dict of options as {name}")
    for place in ("data", "start"):
        if wrong := [name for name, value in settings.get(place, {}).items() if not isinstance(value, str)]:
            raise UserError(f"{path}: {place}: expected a text as {wrong[0]}")
    pairs = [pair for family in families.values() for pair in (family if isinstance(family, list | tuple) else [None])]
    if not pairs or not all(families.values()) or not all(map(_is_pair, pairs)):
        raise UserError(f"{path}: expected families=dict(NAME=[(VARIANT, REFERENCE), ...]), got {families}")
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
        families={name: [tuple(pair) for pair in pairs] for name, pairs in families.items()},
        seeds=list(settings["seeds"]),
        tuning_seeds=list(tuning["seeds"]),
        pilot_seeds=list(settings["pilot_seeds"]),
        rate=tuning["option"],
        grid=sorted(map(_rate, tuning["grid"])),
        largest_grid=tuning.get("largest_grid", LARGEST_GRID),
        evaluations=settings.get("evaluations", 10),
        start=settings.get("start", {}),
        exploratory=settings.get("exploratory", False),
    )
    _check(study)
    return study


def sizes_of(path: str) -> list[str]:
    """Names of the sizes of a study, the default first; one empty name if its file defines none.

    Raises:
        UserError: If the file is missing or cannot be read.
    """
    return list(_read(path).get("sizes") or {"": {}})


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"no study file {path}; the ones of this project are in configs/studies/")
    try:
        return Config.fromfile(path).to_dict()
    except Exception as error:  # a file of Python may raise anything
        raise UserError(f"cannot read the study {path}: {type(error).__name__}: {error}") from error


def _check_types(settings: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], where: str) -> None:
    for name, value in settings.items():
        if not isinstance(value, types[name]) or (isinstance(value, bool) and bool not in types[name]):
            expected = " or ".join(kind.__name__ for kind in types[name])
            raise UserError(f"{where}: expected {expected} as {name}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(name, str) for name in value)


def _rate(value: float) -> float:
    """A learning rate with the six digits that the name of a run has."""
    return float(f"{value:.6g}")


def _check(study: Study) -> None:
    where = study.path
    named = {"baseline": [study.baseline]}
    named |= {f"families.{family}": [n for pair in pairs for n in pair] for family, pairs in study.families.items()}
    for place, names in named.items():
        if unknown := [name for name in names if name not in study.variants]:
            raise UserError(f"{where}: {place} names {', '.join(unknown)}; variants are {', '.join(study.variants)}")
    for family, pairs in study.families.items():
        if wrong := [pair for pair in pairs if pair[0] == pair[1] or pairs.count(pair) > 1]:
            raise UserError(f"{where}: families.{family}: expected different variants, and each pair once: {wrong[0]}")
    for name, options in study.variants.items():
        if not _is_number(rate := options.get(study.rate, 1.0)) or rate <= 0:
            raise UserError(f"{where}: variant {name}: expected a positive number as {study.rate}, got {rate!r}")
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"{where}: expected letters, digits and _ . + - in the name of a variant, got {name!r}")
    groups = {"seeds": study.seeds, "tuning.seeds": study.tuning_seeds, "pilot_seeds": study.pilot_seeds}
    single = len(study.grid) == 1
    for place, seeds in groups.items():
        if not seeds and not (single and place == "tuning.seeds"):
            raise UserError(f"{where}: {place} is empty; a study needs two or more")
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{where}: {place} has a seed twice: {seeds}")
    if single and study.tuning_seeds:
        raise UserError(
            f"{where}: tuning.grid has one rate, so that there is nothing to tune; expected tuning.seeds=[]"
        )
    for place in ("seeds", "pilot_seeds") if single else ("seeds", "pilot_seeds", "tuning.seeds"):
        if len(groups[place]) < 2:
            raise UserError(f"{where}: expected two or more {place}, got {groups[place]}; one seed has no spread")
    for (one, seeds), (other, others) in combinations(groups.items(), 2):
        if common := set(seeds) & set(others):
            raise UserError(f"{where}: {one} and {other} share {sorted(common)}; each seed is used for one purpose")
    if not study.grid or len(set(study.grid)) < len(study.grid) or study.grid[0] <= 0:
        raise UserError(f"{where}: expected different positive learning rates in tuning.grid, got {study.grid}")
    if study.data and set(study.data) != {"variable", "default", "source"}:
        raise UserError(f"{where}: expected data=dict(variable=..., default=..., source=...), got {study.data}")
    if study.name.endswith("_pilot"):
        raise UserError(f"{where}: the name of a study must not end with _pilot, as those of the results of pilots do")
    if study.evaluations < 1:
        raise UserError(f"{where}: expected one or more evaluations, got {study.evaluations}")
    if study.start and not _is_start(study.start):
        raise UserError(
            f"{where}: expected start=dict(checkpoint='... {{seed}} ...', command='...'), got {study.start}"
        )
    for name in ("difference", "factor"):
        if not _is_number(value := getattr(study, name)) or value <= 0:
            raise UserError(f"{where}: expected a positive number as {name}, got {value}")


def _is_start(start: Mapping[str, str]) -> bool:
    """Whether both texts are there, have no field but ``{seed}``, and the checkpoint has that one."""
    try:
        return (
            set(start) == {"checkpoint", "command"}
            and start["checkpoint"].format(seed=0) != start["checkpoint"].format(seed=1)
            and bool(start["command"].format(seed=0))
        )
    except (LookupError, ValueError, AttributeError):  # other fields
        return False


Scores = Mapping[RunId, float]
"""Finished or failed run -> its last score on the tuning data."""


def fixed_rates(study: Study) -> dict[str, float]:
    """Variant -> its learning rate, of the variants that are not tuned: all if the grid has a single rate."""
    default = dict.fromkeys(study.variants, study.grid[0]) if len(study.grid) == 1 else {}
    return default | {name: _rate(own[study.rate]) for name, own in study.variants.items() if study.rate in own}


def tuned_variants(study: Study) -> list[str]:
    """The variants whose learning rate is chosen by tuning."""
    fixed = fixed_rates(study)
    return [name for name in study.variants if name not in fixed]


def pilot_runs(study: Study) -> list[RunId]:
    """The pilot runs, one for each pilot seed: the baseline at its fixed rate, or the middle one of the grid."""
    rate = fixed_rates(study).get(study.baseline, study.grid[len(study.grid) // 2])
    return [RunId(PILOT, study.baseline, seed, rate) for seed in study.pilot_seeds]


def rates_on_grid(study: Study, scores: Scores, grid: Sequence[float]) -> dict[str, float] | None:
    """Choose a learning rate of ``grid`` for each variant: variant -> rate, or None while a tuning run is missing.

    All variants get a common rate: the one with the smallest median, over the variants, of the deficit to a variant's
    best mean score. A variant gets its own best rate instead if that is better than the common one by more than
    ``MARGIN`` standard errors. Without this threshold, equal variants would often get different rates by chance, and
    the effect of the rates would be mistaken for an effect of the variants: in simulated families without any effect,
    up to 23 % showed one instead of 5 %. The cost is that a variant whose best rate differs, but is better by less than
    the threshold, is trained at a rate that is slightly worse for it. Rates that the study fixes are as they are.
    """
    chosen, cells = fixed_rates(study), _tuning_scores(study, scores, grid)
    if not tuned_variants(study):
        return chosen
    margin = tuning_margin(study, scores, grid)
    if margin is None:
        return None
    means = {variant: [statistics.mean(cell) for cell in row] for variant, row in cells.items()}
    deficits = [statistics.median(row[i] - max(row) for row in means.values()) for i in range(len(grid))]
    common = _best(deficits)
    for variant, row in means.items():
        own = _best(row)
        chosen[variant] = grid[own if row[own] - row[common] > margin else common]
    return chosen


def tuning_margin(study: Study, scores: Scores, grid: Sequence[float]) -> float | None:
    """Margin by which a variant's own best rate must beat the common one, as a score; None while a run is missing.

    It is :data:`MARGIN` standard errors of the difference between the mean scores of two rates.
    """
    cells = [cell for row in _tuning_scores(study, scores, grid).values() for cell in row]
    if not cells or any(None in cell for cell in cells):
        return None
    return MARGIN * _spread(cells) * math.sqrt(2 / len(study.tuning_seeds))


def _tuning_scores(study: Study, scores: Scores, grid: Sequence[float]) -> dict[str, list[list[Any]]]:
    """Tuned variant -> for each rate, the scores of the tuning seeds; None for those of missing runs."""
    return {
        variant: [[scores.get(RunId(TUNING, variant, seed, rate)) for seed in study.tuning_seeds] for rate in grid]
        for variant in tuned_variants(study)
    }


def _best(scores: Sequence[float]) -> int:
    """Index of the largest score; among equal scores, the index nearest to the middle of the grid."""
    middle = (len(scores) - 1) / 2
    return max(range(len(scores)), key=lambda i: (scores[i], -abs(i - middle)))


def _spread(cells: Sequence[Sequence[float]]) -> float:
    """Standard deviation over seeds, estimated from the median variance of all cells, which is robust to diverged runs.

    A cell has the scores of all tuning seeds for one variant and rate. Cells in which every run has the score 0, as
    those that diverged before their first evaluation, do not count.
    """
    degrees = len(cells[0]) - 1
    median = statistics.median([statistics.variance(cell) for cell in cells if any(cell)] or [0.0])
    return math.sqrt(median / (float(chi2.ppf(0.5, degrees)) / degrees))


def current_grid(study: Study, scores: Scores) -> list[float]:
    """Learning rates to try for every variant: those of the file, extended where a chosen rate lies at an end.

    When all runs of the grid are finished, it is extended for all variants at once, with the same ratio as between the
    last two rates at that end. If chosen rates lie at both ends, it grows at both or, beyond its largest size, at none.
    """
    grid, tuned = list(study.grid), tuned_variants(study)
    while tuned and len(grid) < study.largest_grid and (rates := rates_on_grid(study, scores, grid)):
        chosen = [rates[name] for name in tuned]
        longer = [_rate(grid[0] ** 2 / grid[1])] if grid[0] in chosen else []
        longer += grid
        longer += [_rate(grid[-1] ** 2 / grid[-2])] if grid[-1] in chosen else []
        if not len(grid) < len(longer) <= study.largest_grid:
            break
        grid = longer
    return grid


def chosen_rates(study: Study, scores: Scores) -> dict[str, float] | None:
    """Variant -> its learning rate, see :func:`rates_on_grid`; None until the tuning of all variants is complete."""
    return rates_on_grid(study, scores, current_grid(study, scores))


def planned_runs(study: Study, scores: Scores) -> list[RunId]:
    """The runs that are needed as far as is known: the tuning runs, and the final runs once the rates are chosen."""
    grid = current_grid(study, scores)
    tuned = tuned_variants(study)
    runs = [RunId(TUNING, variant, seed, rate) for seed in study.tuning_seeds for rate in grid for variant in tuned]
    if rates := chosen_rates(study, scores):
        runs += [RunId(FINAL, variant, seed, rates[variant]) for seed in study.seeds for variant in study.variants]
    return runs


def missing_runs(study: Study, scores: Scores, only: Iterable[str] = ()) -> list[RunId]:
    """The planned runs that have no score yet, limited to the variants in ``only`` unless that is empty."""
    wanted = set(only) or set(study.variants)
    return [run for run in planned_runs(study, scores) if run not in scores and run.variant in wanted]
