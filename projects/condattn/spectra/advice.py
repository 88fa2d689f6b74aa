"""What is worth a look in a measurement, and what to try."""

from __future__ import annotations

from collections.abc import Mapping

from .results import Measurement

LOW_ENTROPY = 0.05
"""Share of log(keys) below which attention counts as saturated."""
SMALL = 1.05
"""A correction that lowers the condition number of no weight of a site by more than this factor is too small."""


def find_warnings(measurements: Mapping[str, Measurement]) -> list[str]:
    """One line for each model and trouble: saturated attention, a preconditioner or a correction that does not help.

    Args:
        measurements: Label -> measurement; a single one has the label ''.
    """
    lines = []
    for label, measurement in measurements.items():
        for sites, text in (
            (_saturated(measurement), _SATURATED),
            (_raising(measurement), _RAISING),
            (_small(measurement), _SMALL),
        ):
            if sites:
                named = ", ".join(sites[:3]) + (f" and {len(sites) - 3} more" if len(sites) > 3 else "")
                lines.append(f"{label}{': ' * bool(label)}{text.format(sites=named, count=len(sites))}")
    return lines


_SATURATED = (
    "attention is saturated (entropy below 5 % of log N) at {sites}: a smaller strength of the spectral correction on "
    "queries and keys (1.0 behind a LayerNorm), or a lower learning rate, keeps it alive"
)
_RAISING = (
    "the preconditioner raises the condition number of the head output at {sites}: leave these sites out with exclude, "
    "or measure again later in the training, when the norms of the rows differ more"
)
_SMALL = (
    "the spectral correction is too small to matter at {sites}: relative=True with strength=3.0 makes it three times "
    "the norm of the weight"
)


def _saturated(measurement: Measurement) -> list[str]:
    return [one.site for one in measurement.entropies if one.keys > 1 and one.relative.median() < LOW_ENTROPY]


def _raising(measurement: Measurement) -> list[str]:
    kappa = {(one.site, one.matrix): one.kappa.nanmedian() for one in measurement.spectra}
    return [s for s in measurement.preconditioned if kappa.get((s, "C A(X)"), 0) > 1.05 * kappa.get((s, "A(X)"), 1)]


def _small(measurement: Measurement) -> list[str]:
    kappa = {(one.site, one.matrix): one.kappa.nanmedian() for one in measurement.spectra}
    gains: dict[str, list[float]] = {}
    for site, matrix in kappa:
        if matrix.endswith(" + C"):
            gain = kappa[site, matrix.removesuffix(" + C")] / kappa[site, matrix]
            gains.setdefault(site, []).append(float(gain))
    return [site for site, values in gains.items() if max(values) < SMALL]
