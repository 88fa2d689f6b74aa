"""Statistics of studies: compared with scipy and a published example, and simulated together with the tuning."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

pytest.importorskip("mmengine")

from scipy import stats as scipy_stats

from condattn.openmmlab.study import plan, statistics
from condattn.openmmlab.study.plan import (
    TUNING,
    RunId,
    Study,
    chosen_rates,
    current_grid,
    missing_runs,
    rates_on_grid,
    tuning_margin,
)

BCG = [
    *((4, 119, 11, 128), (6, 300, 29, 274), (3, 228, 11, 209), (62, 13536, 248, 12619), (33, 5036, 47, 5761)),
    *((180, 1361, 372, 1079), (8, 2537, 10, 619), (505, 87886, 499, 87892), (29, 7470, 45, 7232)),
    *((17, 1699, 65, 1600), (186, 50448, 141, 27197), (5, 2493, 3, 2338), (27, 16886, 29, 17825)),
]
"""Thirteen trials of a vaccine against tuberculosis (Colditz et al. 1994): cases and others, with and without it."""


def a_study(variants=("none", "pc", "sc"), seeds=8, tuning=2) -> Study:
    return Study(
        name="study",
        path=Path("study.py"),
        title="",
        config=Path("config.py"),
        options={},
        data={},
        variants={name: {} for name in variants},
        baseline="none",
        metric="score",
        factor=1.0,
        unit="points",
        difference=1.0,
        families={"methods": [(name, "none") for name in variants[1:]]},
        seeds=list(range(seeds)),
        tuning_seeds=list(range(100, 100 + tuning)),
        pilot_seeds=[200, 201],
        rate="lr",
        grid=[1e-3, 2e-3, 4e-3],
    )


def test_paired_tests_are_those_of_scipy():
    rng = np.random.default_rng(0)
    scores = {"none": rng.normal(70, 1, 8), "pc": rng.normal(71, 1, 8)}
    (found,) = statistics.compare_family(scores, [("pc", "none")], 1.0)
    want = scipy_stats.ttest_rel(scores["pc"], scores["none"])
    interval = want.confidence_interval(0.95)
    assert found.p == pytest.approx(want.pvalue) and found.seeds == 8
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.difference == pytest.approx(np.mean(scores["pc"] - scores["none"]))


def test_intervals_hold_for_the_family():
    rng = np.random.default_rng(1)
    scores = {name: rng.normal(70, 1, 8) for name in ("none", "a", "b", "c")}
    pairs = [(name, "none") for name in "abc"]
    for one in statistics.compare_family(scores, pairs, 1.0):
        differences = scores[one.variant] - scores["none"]
        interval = scipy_stats.ttest_1samp(differences, 0).confidence_interval(1 - 0.05 / 3)
        assert (one.low, one.high) == pytest.approx((interval.low, interval.high))


def test_holm():
    """Definition: the smallest of m p-values times m, the next times m - 1, and so on, never decreasing."""
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.6]) == [1.0, 1.0]
    assert statistics.holm([0.02]) == [0.02]


def test_holm_by_closed_testing():
    """Holm's adjusted p is the largest Bonferroni p of all subsets of the family that contain the hypothesis."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        p = rng.uniform(0, 0.3, 4)
        subsets = [[i for i in range(4) if mask >> i & 1] for mask in range(1, 16)]
        want = [max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(4)]
        assert statistics.holm(p) == pytest.approx(want)


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([2.0, 2.1, 1.9, 2.2, 2.0, 1.8], "helps"),
        ([-2.0, -2.1, -1.9, -2.2, -2.0, -1.8], "hurts"),
        ([0.1, -0.1, 0.2, -0.2, 0.05, -0.05], "no difference larger than 1"),
        ([3.0, -3.0, 2.0, -2.0, 4.0, -3.5], "undecided"),
        ([0.0] * 6, "no difference larger than 1"),
    ],
)
def test_verdicts(values, verdict):
    scores = {"none": np.full(6, 50.0), "pc": 50.0 + np.array(values)}
    (found,) = statistics.compare_family(scores, [("pc", "none")], 1.0)
    assert found.verdict == verdict


def test_unequal_numbers_of_seeds_are_refused():
    for scores in ({"none": [1, 2, 3], "pc": [1, 2]}, {"none": [1], "pc": [2]}):
        with pytest.raises(ValueError, match="expected two or more pairs of seeds"):
            statistics.compare_family(scores, [("pc", "none")], 1.0)


def test_paired_ratios():
    """The interval of a t test of the logarithms; pairs whose ratios are equal have no interval."""
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(1.0, 0.5, 9), rng.lognormal(0.0, 0.5, 9)
    interval = scipy_stats.ttest_rel(np.log(a), np.log(b)).confidence_interval(0.95)
    expected = (np.exp(np.mean(np.log(a / b))), np.exp(interval.low), np.exp(interval.high))
    np.testing.assert_allclose(statistics.paired_ratio(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(statistics.paired_ratio([2.0, 6.0], [1.0, 3.0]), 2.0)


def test_random_effects_of_a_published_example():
    """Log relative risks; Paule and Mandel's variance between trials is published as 0.318 (metafor: 0.3181)."""
    with_cases, with_others, cases, others = np.array(BCG, dtype=float).T
    effects = np.log(with_cases / (with_cases + with_others)) - np.log(cases / (cases + others))
    variances = 1 / with_cases - 1 / (with_cases + with_others) + 1 / cases - 1 / (cases + others)
    found = statistics.pool(effects, variances)
    assert found.tau**2 == pytest.approx(0.3181, abs=1e-4)
    # Hartung and Knapp's variance, computed explicitly.
    weights = 1 / (variances + found.tau**2)
    mean = (weights * effects).sum() / weights.sum()
    error = math.sqrt((weights * (effects - mean) ** 2).sum() / (12 * weights.sum()))
    assert found.estimate == pytest.approx(mean) == pytest.approx(-0.715, abs=1e-3)
    half = scipy_stats.t.ppf(0.975, 12) * error
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-6)


def test_random_effects_of_equal_studies():
    found = statistics.pool([1.0, 1.0, 1.0], [0.04, 0.04, 0.04])
    assert found.estimate == pytest.approx(1.0) and found.tau == 0
    assert found.high - 1 == pytest.approx(scipy_stats.t.ppf(0.975, 2) * math.sqrt(0.04 / 3))
    with pytest.raises(ValueError, match="two or more studies"):
        statistics.pool([1.0], [0.1])


class NoisyScores(dict):
    """Mapping of runs to random scores, whose mean depends on variant and learning rate; drawn at the first access."""

    def __init__(self, rng, quality):
        super().__init__()
        self.rng, self.quality = rng, quality

    def get(self, run, default=None):
        return self.setdefault(run, self.quality(run.variant, run.rate) + self.rng.normal())


def share_of_families_that_find_an_effect(slope, variants=("none", "pc", "sc"), best=MappingProxyType({})):
    """Simulate 2,000 families of two with their tuning; a step of the grid costs ``slope`` standard deviations.

    All variants are equally good at the rates that are best for them, 0.002 or those in ``best``.
    """
    rng, study, number = np.random.default_rng(3), a_study(variants), 2000

    def quality(variant: str, rate: float) -> float:
        return -slope * abs(math.log2(rate / best.get(variant, 2e-3)))

    found = 0
    for _ in range(number):
        rates = chosen_rates(study, NoisyScores(rng, quality))
        finals = {name: quality(name, rates[name]) + rng.normal(0, 1, 8) for name in variants[:3]}
        p_values = [statistics.paired_p(finals[name] - finals["none"]) for name in variants[1:3]]
        found += min(statistics.holm(p_values)) <= 0.05
    return found / number


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize(
    "variants",
    [("none", "pc", "sc"), pytest.param(("none", *"abcdefgh"), marks=pytest.mark.slow)],
    ids=["three", "nine"],
)
def test_a_family_without_effect_rarely_finds_one(slope, variants):
    share = share_of_families_that_find_an_effect(slope, variants)
    assert share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def stated_shares() -> tuple[int, ...]:
    """Percentages of families that docs/results.md states: without the margin, and for three slopes."""
    text = " ".join((Path(__file__).parents[1] / "docs" / "results.md").read_text().split())
    found = [
        re.search(r"up to (\d+) % of families", text),
        re.search(r"then (\d+), (\d+) or (\d+) % of families", text),
    ]
    return tuple(int(share) for one in found for share in one.groups())


def test_the_shares_that_are_stated_can_be_read():
    """By the slow tests that compare them."""
    assert len(stated_shares()) == 4


@pytest.mark.slow
def test_without_the_margin_families_without_effect_find_one(monkeypatch):
    """The share that docs/results.md names, if each variant took its own best rate."""
    monkeypatch.setattr(plan, "MARGIN", 0.0)
    largest = max(share_of_families_that_find_an_effect(slope) for slope in (0.5, 1.0, 1.5, 3.0))
    assert largest == pytest.approx(stated_shares()[0] / 100, abs=0.01)


@pytest.mark.slow
def test_where_variants_have_different_best_rates_families_find_the_effect_of_the_rate():
    """The shares that docs/results.md names: a common rate is not the best for all."""
    for slope, share in zip((0.5, 1.0, 1.5), stated_shares()[1:], strict=True):
        found = share_of_families_that_find_an_effect(slope, best={"pc": 4e-3})
        assert found == pytest.approx(share / 100, abs=0.01)


def test_without_tuning_error_the_level_is_kept():
    rng, study, number = np.random.default_rng(4), a_study(), 2000
    found = 0
    for _ in range(number):
        finals = {name: rng.normal(50, 1, 8) for name in study.variants}
        found += any(one.p <= 0.05 for one in statistics.compare_family(finals, study.families["methods"], 1.0))
    assert found / number <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / number)


def test_the_power_stated_is_the_power_found():
    rng, seeds, level = np.random.default_rng(5), 8, 0.05 / 2
    difference = statistics.detectable_difference(1.0, seeds, level)
    found = 0
    for _ in range(2000):
        sample = rng.normal(difference, 1.0, seeds)
        found += scipy_stats.ttest_1samp(sample, 0).pvalue <= level
    assert found / 2000 == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / 2000))
    assert statistics.seeds_for(difference, 1.0, level) == seeds


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0, 40.0])
def test_the_number_of_seeds_is_the_smallest(ratio):
    """Also where thousands would be needed, as beside a run that diverged."""
    seeds = statistics.seeds_for(1.0, ratio, 0.05)
    assert statistics.power_of(1.0, ratio, seeds, 0.05) >= 0.8
    assert seeds == 2 or statistics.power_of(1.0, ratio, seeds - 1, 0.05) < 0.8


@pytest.mark.parametrize("comparisons", [1, 3, 12])
@pytest.mark.parametrize("seeds", [2, 3])
def test_what_few_seeds_detect(seeds, comparisons):
    """With two seeds the t distribution has such heavy tails that hundreds of standard errors are needed."""
    level = 0.05 / comparisons
    difference = statistics.detectable_difference(2.0, seeds, level)
    assert statistics.power_of(difference, 2.0, seeds, level) == pytest.approx(0.8, abs=1e-6)


def tuned(study, **scores):
    """Tuning scores of each variant at the rates of the grid and above; the scores of both seeds differ by 0.1."""
    ratio = study.grid[1] / study.grid[0]
    return {
        RunId(TUNING, variant, seed, float(f"{study.grid[0] * ratio**i:.6g}")): value + 0.1 * n
        for variant, values in scores.items()
        for i, value in enumerate(values)
        for n, seed in enumerate(study.tuning_seeds)
    }


def test_all_variants_take_the_rate_that_is_best_for_most():
    study = a_study()
    scores = tuned(study, none=(1.0, 3.0, 2.0), pc=(1.0, 3.0, 3.05), sc=(1.0, 3.0, 2.0))
    assert chosen_rates(study, scores) == dict.fromkeys(study.variants, 2e-3)


def test_a_variant_that_needs_another_rate_gets_it_and_the_grid_grows_for_all():
    study = a_study()
    scores = tuned(study, none=(1.0, 3.0, 2.0), pc=(1.0, 3.0, 6.0), sc=(1.0, 3.0, 2.0))
    assert current_grid(study, scores) == [1e-3, 2e-3, 4e-3, 8e-3]
    assert chosen_rates(study, scores) is None
    assert {run.rate for run in missing_runs(study, scores)} == {8e-3}
    assert {run.variant for run in missing_runs(study, scores)} == set(study.variants)
    scores = tuned(study, none=(1.0, 3.0, 2.0, 1.0), pc=(1.0, 3.0, 6.0, 5.0), sc=(1.0, 3.0, 2.0, 1.0))
    assert chosen_rates(study, scores) == {"none": 2e-3, "pc": 4e-3, "sc": 2e-3}
    assert len(missing_runs(study, scores)) == len(study.variants) * len(study.seeds)
    assert {run.variant for run in missing_runs(study, scores, only=["pc"])} == {"pc"}


def test_a_grid_does_not_grow_for_ever():
    study = a_study()
    scores = tuned(study, none=range(20), pc=range(20), sc=range(20))
    assert len(current_grid(study, scores)) == 7
    assert set(chosen_rates(study, scores).values()) == {0.064}


def test_a_grid_with_chosen_rates_at_both_ends():
    """It grows at both ends at once, and never beyond its largest size."""
    study = a_study(variants=("none", "pc", "sc"))
    scores = tuned(study, none=(3.0, 2.0, 1.0), pc=(3.0, 2.0, 1.0), sc=(1.0, 2.0, 9.0))
    assert current_grid(study, scores) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert current_grid(replace(study, largest_grid=4), scores) == [1e-3, 2e-3, 4e-3]


def test_diverged_runs_do_not_move_the_others():
    study = a_study()
    scores = tuned(study, none=(1.0, 3.0, 2.0), pc=(1.0, 3.0, 2.0), sc=(2.0, 0.0, 0.0))
    scores[RunId(TUNING, "sc", 100, 1e-3)] = 5.0
    rates = rates_on_grid(study, scores, study.grid)
    assert rates["none"] == rates["pc"] == 2e-3 and rates["sc"] == 1e-3


def test_rates_at_which_every_run_diverged_leave_the_margin_as_it_is():
    study = a_study()
    scores = tuned(study, none=(1.0, 3.0, 2.0), pc=(1.0, 3.0, 2.0), sc=(2.0, 3.0, 2.0))
    for run in [run for run in scores if run.rate != 2e-3]:
        scores[run] = 0.0
    alone = tuning_margin(study, scores, [2e-3])
    assert tuning_margin(study, scores, study.grid) == alone > 0
    assert tuning_margin(study, dict.fromkeys(scores, 0.0), study.grid) == 0.0
