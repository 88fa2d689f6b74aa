"""Statistics of studies: paired comparisons over seeds, corrected within a family, and estimates over several studies.

Differences and deviations are in the unit of the scores, usually percentage points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

ALPHA = 0.05
"""Probability that a family without any effect shows one (family-wise error rate)."""
POWER = 0.8
"""Probability that a comparison finds a difference of the size that is called detectable."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of a variant with its reference over the same seeds.

    Attributes:
        variant: Name of the variant.
        reference: Name of the reference.
        seeds: Number of pairs.
        difference: Mean of variant minus reference.
        deviation: Standard deviation of the differences.
        low: Lower end of the interval that holds for all comparisons of the family at once (Bonferroni).
        high: Upper end of the interval.
        p: Two-sided p-value, corrected for the family (Holm).
        detectable: The smallest true difference that such a comparison finds with probability ``POWER``, if the
            differences have this standard deviation, at the strictest level of Holm's procedure.
        verdict: 'helps', 'hurts', 'no difference larger than X' or 'undecided'.
    """

    variant: str
    reference: str
    seeds: int
    difference: float
    deviation: float
    low: float
    high: float
    p: float
    detectable: float
    verdict: str


def compare_family(
    scores: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]], relevant: float, alpha: float = ALPHA
) -> list[Comparison]:
    """Paired t tests of ``pairs`` (variant, reference), with Holm's correction over all of them.

    Args:
        scores: Variant -> score of each seed, in the order of the seeds.
        pairs: The family of comparisons.
        relevant: Smallest difference that is considered relevant, declared beforehand.
        alpha: Family-wise error rate.

    Raises:
        ValueError: If a pair has fewer than two seeds, or different numbers of seeds.
    """
    differences = []
    for variant, reference in pairs:
        a, b = (np.asarray(scores[name], dtype=float) for name in (variant, reference))
        if len(a) != len(b) or len(a) < 2:
            raise ValueError(
                f"{variant} and {reference}: expected two or more pairs of seeds, got {len(a)} and {len(b)}"
            )
        differences.append(a - b)
    corrected = holm([paired_p(d) for d in differences])
    level = alpha / len(pairs)
    found = []
    for (variant, reference), d, p in zip(pairs, differences, corrected, strict=True):
        mean, deviation, n = float(d.mean()), float(d.std(ddof=1)), len(d)
        half = float(stats.t.ppf(1 - level / 2, n - 1)) * deviation / math.sqrt(n)
        low, high = mean - half, mean + half
        detectable = detectable_difference(deviation, n, level)
        verdict = _verdict(mean, low, high, p, relevant, alpha)
        found.append(Comparison(variant, reference, n, mean, deviation, low, high, p, detectable, verdict))
    return found


def _verdict(mean: float, low: float, high: float, p: float, relevant: float, alpha: float) -> str:
    if p <= alpha:
        return "helps" if mean > 0 else "hurts"
    if -relevant <= low and high <= relevant:
        return f"no difference larger than {relevant:g}"
    return "undecided"


def paired_p(differences: np.ndarray) -> float:
    """Two-sided p-value of a paired t test; 1 if all differences are 0, and 0 if all are equal and not 0."""
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): adjusted p-values, in the order of ``p_values``."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def paired_ratio(
    values: Sequence[float], references: Sequence[float], alpha: float = ALPHA
) -> tuple[float, float, float]:
    """Geometric mean of the ratios of paired positive numbers, and the ends of its interval (t, of the logarithms)."""
    logarithms = np.log(np.asarray(values, dtype=float)) - np.log(np.asarray(references, dtype=float))
    n = len(logarithms)
    half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * float(logarithms.std(ddof=1)) / math.sqrt(n)
    mean = float(logarithms.mean())
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def power_of(difference: float, deviation: float, seeds: int, level: float) -> float:
    """Probability that a two-sided paired t test at ``level`` finds a positive ``difference`` (noncentral t)."""
    critical = stats.t.ppf(1 - level / 2, seeds - 1)
    shift = difference / deviation * math.sqrt(seeds)
    return float(stats.nct.sf(critical, seeds - 1, shift))


def detectable_difference(deviation: float, seeds: int, level: float, power: float = POWER) -> float:
    """The smallest difference that a paired t test over ``seeds`` finds with probability ``power``."""
    if deviation == 0:
        return 0.0
    scale = deviation / math.sqrt(seeds)
    high = scale * (stats.t.ppf(1 - level / 2, seeds - 1) + 10)
    while power_of(high, deviation, seeds, level) < power:
        high *= 2
    return float(optimize.brentq(lambda d: power_of(d, deviation, seeds, level) - power, 0.0, high))


def seeds_for(difference: float, deviation: float, level: float, power: float = POWER) -> int:
    """Smallest number of seeds with which a paired t test finds ``difference`` with probability ``power``."""
    few, many = 1, 2
    while power_of(difference, deviation, many, level) < power:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if power_of(difference, deviation, middle, level) >= power else (middle, many)
    return many


@dataclass(frozen=True)
class Pooled:
    """A random-effects estimate over studies.

    Attributes:
        studies: Number of studies.
        estimate: Mean effect.
        low: Lower end of its 95 % interval.
        high: Upper end of the interval.
        p: Two-sided p-value.
        tau: Standard deviation of the true effects between studies.
    """

    studies: int
    estimate: float
    low: float
    high: float
    p: float
    tau: float


def pool(effects: Sequence[float], variances: Sequence[float], alpha: float = ALPHA) -> Pooled:
    """Random-effects estimate with the interval of Hartung and Knapp (2001), which is reliable for few studies.

    The variance between studies is estimated as by Paule and Mandel (1982): it makes Hartung and Knapp's factor, the
    weighted sum of squares over k - 1, equal to 1. Where that variance is 0, the factor is at most 1, and 1 is used
    instead, so that it never reduces the variance of the estimate (Roever, Knapp and Friede 2015).

    Args:
        effects: Effect in each study.
        variances: Squared standard errors of the effects.
        alpha: One minus the coverage of the interval.

    Raises:
        ValueError: If there are fewer than two studies, or a variance is not positive.
    """
    y, v = np.asarray(effects, dtype=float), np.asarray(variances, dtype=float)
    if len(y) < 2 or not (v > 0).all():
        raise ValueError(f"expected two or more studies with positive variances, got {len(y)}: {v.tolist()}")
    k = len(y)

    def weighted(tau2: float) -> tuple[np.ndarray, float]:
        weights = 1 / (v + tau2)
        return weights, float((weights * y).sum() / weights.sum())

    def excess(tau2: float) -> float:
        weights, mean = weighted(tau2)
        return float((weights * (y - mean) ** 2).sum() - (k - 1))

    upper = 10 * float(y.var() + v.max())
    tau2 = float(optimize.brentq(excess, 0.0, upper)) if excess(0.0) > 0 else 0.0
    weights, mean = weighted(tau2)
    error = math.sqrt(1 / weights.sum())
    half = float(stats.t.ppf(1 - alpha / 2, k - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, k - 1))
    return Pooled(k, mean, mean - half, mean + half, p, math.sqrt(tau2))
