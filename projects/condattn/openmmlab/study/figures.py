"""Figures of a study as SVG; equal data give equal files."""

import io
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plan import Study
from .results import Results
from .statistics import Comparison

COLORS = ("#555555", "#3b6fb6", "#d1702b", "#3d8f5f", "#a3479c", "#b5a02a", "#c0392b")
DRAWN = {
    "kappa_W_Q": "condition number of W_Q",
    "kappa_W_V": "condition number of W_V",
    "kappa_map": "condition number of the map",
    "kappa_AX": "condition number of the head output",
    "kappa_CAX": "condition number behind the preconditioner",
    "entropy": "attention entropy, share of the largest",
    "largest_logit": "largest logit",
}


def draw_curves(study: Study, results: Results) -> str:
    """Draw learning curves of each family on the tuning data: mean of the final runs, with one standard deviation.

    Returns:
        The figure, or an empty string if no final run has finished.
    """

    def draw(axes: Axes, family: str) -> None:
        for color, name in zip(cycle(COLORS), family_members(study, family), strict=False):
            records = results.final(name)
            steps = sorted({step for record in records for step, _ in record.curve})
            curves = [[(x, y * study.factor) for x, y in record.curve_over(steps)] for record in records]
            _band(axes, curves, name, color)
        axes.set(title=family, xlabel="iteration", ylabel=study.unit)

    return _render(list(study.families), draw) if any(map(results.final, study.variants)) else ""


def draw_spectra(study: Study, results: Results) -> str:
    """Draw condition numbers, entropy and the largest logit during training, for each family.

    Means and standard deviations of condition numbers are those of their logarithms.

    Returns:
        The figure, or an empty string if none were measured.
    """
    records = {name: results.final(name) for name in study.variants}
    found = [q for q in DRAWN if any(q in record.spectra for one in records.values() for record in one)]

    def draw(axes: Axes, panel: tuple[str, str]) -> None:
        family, quantity = panel
        for color, name in zip(cycle(COLORS), family_members(study, family), strict=False):
            curves = [record.spectra[quantity] for record in records[name] if quantity in record.spectra]
            _band(axes, curves, name, color, logarithmic=quantity.startswith("kappa"))
        prefix = f"{family}: " if len(study.families) > 1 else ""
        axes.set(title=prefix + DRAWN[quantity], xlabel="iteration")

    return _render([(family, quantity) for family in study.families for quantity in found], draw) if found else ""


def draw_differences(found: Sequence[tuple[Study, Sequence[Comparison]]]) -> str:
    """Draw the differences of complete studies with their intervals, and the size of difference that matters.

    Args:
        found: Studies and their comparisons with the baseline, the first study at the top.
    """
    names = dict.fromkeys(one.variant for _, family in found for one in family)
    colors = dict(zip(names, cycle(COLORS[1:]), strict=False))
    rows = [(study, one) for study, family in found for one in family]
    with _style():
        figure = Figure(figsize=(7.0, 0.7 + 0.3 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for y, (study, one) in enumerate(rows):
            axes.barh(y, 2 * study.difference, height=0.7, left=-study.difference, color="#e8e8e8")
            axes.plot([one.low, one.high], [y, y], color=colors[one.variant])
            axes.plot(one.difference, y, "o", color=colors[one.variant])
        axes.axvline(0.0, color="#555555", linewidth=0.8)
        labels = [f"{study.name}, {one.variant}, {one.seeds} seeds" for study, one in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        label = "difference to 'none' in points, 95 % intervals; grey: smaller than what matters"
        figure.supxlabel(label, fontsize="medium")  # wider than the axes
        return _svg(figure)


def family_members(study: Study, family: str) -> list[str]:
    """Names of the references and variants of a family, without repetition."""
    pairs = study.families[family]
    return list(dict.fromkeys([*(reference for _, reference in pairs), *(variant for variant, _ in pairs)]))


def _band(
    axes: Axes, curves: Sequence[Sequence[Sequence[float]]], label: str, color: str, logarithmic: bool = False
) -> None:
    if not curves:
        return
    scale, back = (math.log, math.exp) if logarithmic else (float, float)
    steps = sorted({step for curve in curves for step, _ in curve})
    values = [[scale(y) for curve in curves for x, y in curve if x == step] for step in steps]
    middle = [statistics.mean(v) for v in values]
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    axes.plot(steps, list(map(back, middle)), color=color, label=f"{label} ({len(curves)})")
    low, high = ([back(m + sign * s) for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    if logarithmic:
        axes.set_yscale("log")


def _render(panels: Sequence[Any], draw: Callable[[Axes, Any], None]) -> str:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with _style():
        figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            draw(axes, panel)
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)
        return _svg(figure)


def _style() -> AbstractContextManager:
    return matplotlib.rc_context({"svg.hashsalt": "condattn", "svg.fonttype": "none", "font.size": 9})


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
