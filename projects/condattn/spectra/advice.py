"""Find problems in measurements, and advise what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..wording import some
from .results import Measurement

LOW_ENTROPY = 0.05
"""Attention counts as saturated if its entropy is below this share of log(keys)."""
SMALL = 1.05
"""A correction counts as too small if it changes the condition numbers of a site by at most this factor ..."""
LOW_KAPPA = 2.0
"""... and they are above this value."""


def find_warnings(measurements: Mapping[str, Measurement], trained: bool = True) -> list[str]:
    """Return one line for each model and problem.

    Problems are saturated attention, and a preconditioner or a correction that does not help.

    Args:
        measurements: Label -> measurement; a single one has the label ''.
        trained: Whether the models have been trained. Before training, the rows of head outputs have nearly equal
            norms. That a preconditioner changes little, or raises a condition number, then means nothing and is not
            reported.
    """
    lines = []
    for label, measurement in measurements.items():
        for sites, text in (
            (_saturated(measurement), _SATURATED),
            (_raising(measurement) if trained else [], _RAISING),
            (_small(measurement), _SMALL),
        ):
            if sites:
                named = some(site or "the model itself" for site in sites)
                lines.append(f"{label}{': ' * bool(label)}{text.format(sites=named, count=len(sites))}")
    return lines


_SATURATED = (
    "attention is saturated (entropy below 5 % of log N, in half of the heads or more) at {sites}: where there is a "
    "spectral correction, a smaller strength on queries and keys (1.0 behind a LayerNorm) keeps it alive, elsewhere a "
    "lower learning rate or weight decay on them"
)
_RAISING = (
    "the preconditioner raises the condition number of the head output at {sites}: compare with a training that leaves "
    "these sites out with exclude"
)
_SMALL = (
    "the spectral correction is too small to matter at {sites}: relative=True with strength=3.0 makes it three times "
    "the norm of the weight"
)


def _saturated(measurement: Measurement) -> list[str]:
    found = []
    for one in measurement.entropies:
        heads = one.relative.nanquantile(0.5, dim=0)
        if (heads < LOW_ENTROPY).double().mean() >= 0.5:
            found.append(one.site)
    return list(dict.fromkeys(found))


def _raising(measurement: Measurement) -> list[str]:
    kappa = {(one.site, one.matrix): one.kappa.nanmedian().item() for one in measurement.spectra}
    return [s for s in measurement.preconditioned if kappa.get((s, "C A(X)"), 0) > 1.05 * kappa.get((s, "A(X)"), 1)]


def _small(measurement: Measurement) -> list[str]:
    kappa = {(one.site, one.matrix): one.kappa.nanmedian().item() for one in measurement.spectra}
    changed: dict[str, list[bool]] = {}
    for site, matrix in kappa:
        if matrix.endswith(" + C"):
            gain = kappa[site, matrix.removesuffix(" + C")] / kappa[site, matrix]
            matters = abs(math.log(gain)) > math.log(SMALL) or kappa[site, matrix] < LOW_KAPPA
            changed.setdefault(site, []).append(matters)
    return [site for site, values in changed.items() if not any(values)]
