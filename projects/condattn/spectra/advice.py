"""Find problems in measurements, and advise what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..wording import some
from .results import Measurement

LOW_ENTROPY = 0.05
"""Attention counts as saturated if its entropy is below this share of its largest value."""
SMALL = 1.05
"""A correction counts as too small if it changes the condition numbers of a site by at most this factor ..."""
LOW_KAPPA = 2.0
"""... and they are above this value."""


def find_warnings(measurements: Mapping[str, Measurement], trained: bool = True) -> list[str]:
    """Return one line for each model and problem.

    Problems are saturated attention, a preconditioner or a correction that does not help, and condition numbers of maps
    and outputs that could not be computed in float64.

    Args:
        measurements: Label -> measurement; a single one has the label ''.
        trained: Whether the models have been trained. Before training, the rows of head outputs have nearly equal
            norms. That a preconditioner changes little, or raises a condition number, then means nothing and is not
            reported.
    """
    lines = []
    for label, measurement in measurements.items():
        for sites, text, reason in (
            (_saturated(measurement), _SATURATED, ""),
            (_raising(measurement) if trained else [], _RAISING, ""),
            (_small(measurement), _SMALL, ""),
            *((sites, _LIMITED, reason) for reason, sites in _limited(measurement).items()),
        ):
            if sites:
                named = some(site or "the model itself" for site in sites)
                lines.append(f"{label}{': ' * bool(label)}{text.format(sites=named, reason=reason)}")
    return lines


_SATURATED = (
    "attention is saturated (entropy below 5 % of its largest value, in half of the heads or more) at {sites}: where "
    "weights are corrected, a smaller correction of queries and keys keeps it alive (of 'sc', a strength of 1.0 behind "
    "a LayerNorm), elsewhere a lower learning rate or weight decay on them"
)
_RAISING = (
    "the preconditioner raises the condition number of the head output at {sites}: compare with a training that leaves "
    "these sites out with exclude"
)
_SMALL = (
    "the correction of the weights is too small to matter at {sites}: use a larger one; relative=True with "
    "strength=3.0 of 'sc' makes it three times the norm of the weight"
)
_LIMITED = (
    "condition numbers of maps and outputs are limited by the precision at {sites}, which is {reason}: singular values "
    "that are smaller than rounding errors count as zero"
)


def _saturated(measurement: Measurement) -> list[str]:
    found = []
    for site in dict.fromkeys(one.site for one in measurement.entropies):
        heads = measurement.relative_entropy(site).nanquantile(0.5, dim=0)
        if (heads < LOW_ENTROPY).double().mean() >= 0.5:
            found.append(site)
    return found


def _limited(measurement: Measurement) -> dict[str, list[str]]:
    """Return what limits the precision -> the sites."""
    sites: dict[str, list[str]] = {}
    for site, reason in measurement.limits.items():
        sites.setdefault(reason, []).append(site)
    return sites


def _medians(measurement: Measurement) -> dict[tuple[str, str], float]:
    """Return (site, matrix) -> the median of its condition number, over heads and samples of all sizes."""
    keys = dict.fromkeys((one.site, one.matrix) for one in measurement.spectra)
    return {key: measurement.kappa(*key).nanmedian().item() for key in keys}


def _raising(measurement: Measurement) -> list[str]:
    kappa = _medians(measurement)
    return [s for s in measurement.preconditioned if kappa.get((s, "C A(X)"), 0) > 1.05 * kappa.get((s, "A(X)"), 1)]


def _small(measurement: Measurement) -> list[str]:
    kappa = _medians(measurement)
    changed: dict[str, list[bool]] = {}
    for site, matrix in kappa:
        if matrix.endswith(" + C"):
            gain = kappa[site, matrix.removesuffix(" + C")] / kappa[site, matrix]
            matters = abs(math.log(gain)) > math.log(SMALL) or kappa[site, matrix] < LOW_KAPPA
            changed.setdefault(site, []).append(matters)
    return [site for site, values in changed.items() if not any(values)]
