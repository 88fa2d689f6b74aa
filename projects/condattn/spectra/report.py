"""Report the measurements of one or several models as a table, CSV, JSON, plots and one HTML page."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .advice import LOW_ENTROPY, find_warnings
from .results import Measurement

PANELS = {"W_Q": "W_Q", "W_K": "W_K", "W_V": "W_V", "map": "attention map", "A(X)": "head output"}
JACOBIANS = {f"dA(X)/dW_{name}": f"Jacobian by W_{name}" for name in "QKV"}
STYLES = ("-", "--", "-.", ":")
COLORS = ("#3b6fb6", "#d1702b", "#3d8f5f", "#a3479c", "#7a7a7a", "#b5a02a")

Measurements = Mapping[str, Measurement]
"""Label, such as the name of a conditioning -> the measurement of that model."""
Row = dict[str, Any]


def flat_rows(measurements: Measurements) -> list[Row]:
    """Return the rows of all measurements, each with its label; see :meth:`condattn.spectra.Measurement.rows`."""
    return [dict(model=label, **row) for label, measurement in measurements.items() for row in measurement.rows()]


def summary(measurements: Measurements) -> list[Row]:
    """Return one row for each model and site: medians over the heads of the quantities that the model computes with.

    Columns: model, site, kappa of each of ``PANELS``, relative_entropy, largest_logit (of all heads). A value is None
    if it was not measured. If Jacobians were measured, there are also kappa of each of ``JACOBIANS`` and the bound of
    Thm 3.4.
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in flat_rows(measurements):
        values = found.setdefault((row["model"], row["site"]), {})
        if row["quantity"] == "entropy":
            for name in ("relative_entropy", "largest_logit"):
                values.setdefault(name, []).append(row[name])
        elif row["used"]:
            values.setdefault(_panel(row), []).append(row["kappa"])
            if "bound" in row:
                values.setdefault("bound", []).append(row["bound"])
    jacobians = [*JACOBIANS, "bound"] if any(JACOBIANS.keys() & values.keys() for values in found.values()) else []
    middles = [*PANELS, *jacobians, "relative_entropy"]
    lines = []
    for (model, site), values in found.items():
        middle = {name: float(np.nanmedian(values[name])) if name in values else None for name in middles}
        largest = max(values["largest_logit"]) if "largest_logit" in values else None
        lines.append(dict(model=model, site=site) | middle | dict(largest_logit=largest))
    return lines


def title_of(column: str) -> str:
    """Return the heading of a column of :func:`summary`."""
    return (PANELS | JACOBIANS).get(column, column.replace("_", " "))


def _panel(row: Row) -> str:
    return row["quantity"].replace("C A(X)", "A(X)").removesuffix(" + C")


def check_folder(folder: Path) -> None:
    """Raise a ValueError if :func:`write_report` could not write into ``folder``, and leave everything as it is."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be written ({error.strerror}); choose another") from error
    finally:
        for path in missing:
            if path.is_dir():
                path.rmdir()


def write_report(measurements: Measurements, folder: Path, title: str, trained: bool = True) -> list[Path]:
    """Write spectra.csv, spectra.json, the plots (PNG) and report.html into ``folder``; returns their paths.

    ``trained`` says whether the models have been trained; see :func:`condattn.spectra.advice.find_warnings`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = flat_rows(measurements)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    paths = [folder / "spectra.csv", folder / "spectra.json"]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    paths[1].write_text(json.dumps([_json_safe(row) for row in rows], indent=1, allow_nan=False))
    pictures = {}
    for name, draw in PLOTS.items():
        figure = draw(measurements)
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130)
            pictures[name] = buffer.getvalue()
            paths.append(folder / f"{name}.png")
            paths[-1].write_bytes(pictures[name])
    paths.append(folder / "report.html")
    paths[-1].write_text(page(measurements, pictures, title, trained), encoding="utf-8")
    return paths


def _json_safe(row: Row) -> Row:
    """Replace numbers that JSON does not have (infinity, NaN) by None."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def plot_depth(measurements: Measurements) -> Figure | None:
    """Condition numbers by depth: one panel a matrix, one line a model; the band holds all heads."""
    data: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in flat_rows(measurements):
        if row.get("used") and _panel(row) in PANELS and math.isfinite(row["kappa"]):
            data.setdefault(_panel(row), {}).setdefault(row["model"], {}).setdefault(row["depth"], []).append(
                row["kappa"]
            )
    panels = [name for name in PANELS if name in data]
    if not panels:
        return None
    figure, axes = _grid(panels)
    for name, axis in zip(panels, axes, strict=True):
        for model, _, look in _looks(measurements):
            _line_with_band(axis, data[name].get(model, {}), look)
        axis.set(title=PANELS[name], yscale="log", xlabel="attention layer", ylabel="condition number")
    axes[0].legend()
    return figure


def plot_heads(measurements: Measurements) -> Figure | None:
    """Condition numbers of the head outputs: a heat map of heads and depths for each model."""
    maps = {}
    for label, measurement in measurements.items():
        used = (one for one in measurement.spectra if "A(X)" in one.matrix and measurement.is_used(one))
        columns = {
            measurement.sites[site]: measurement.kappa(site, matrix).nanquantile(0.5, dim=0).log10().numpy()
            for site, matrix in {one.site: one.matrix for one in used}.items()
        }
        if columns:
            grid = np.full((max(map(len, columns.values())), 1 + max(columns)), np.nan)
            for depth, column in columns.items():
                grid[: len(column), depth] = column
            maps[label] = grid
    if not maps:
        return None
    low, high = (limit([limit(grid) for grid in maps.values()]) for limit in (np.nanmin, np.nanmax))
    figure, axes = _grid(maps)
    for (label, grid), axis in zip(maps.items(), axes, strict=True):
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        axis.set(title=label, xlabel="attention layer", ylabel="head")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=list(axes), label="log10 of the condition number")
    return figure


def plot_values(measurements: Measurements) -> Figure | None:
    """Singular values of the head outputs over the largest, at the first, the middle and the last layer."""
    depths = sorted({m.sites[s.site] for m in measurements.values() for s in m.spectra if s.matrix == "A(X)"})
    if not depths:
        return None
    depths = sorted({depths[0], depths[len(depths) // 2], depths[-1]})
    figure, axes = _grid(depths)
    for depth, axis in zip(depths, axes, strict=True):
        for _, measurement, look in _looks(measurements):
            for one in measurement.spectra:
                if "A(X)" in one.matrix and measurement.is_used(one) and measurement.sites[one.site] == depth:
                    values = one.values.flatten(0, 1).numpy()
                    values = np.median(values / np.maximum(values[:, :1], 1e-300), 0)
                    axis.plot(np.arange(1, len(values) + 1), np.maximum(values, 1e-16), **look)
        axis.set(title=f"layer {depth}", yscale="log", xlabel="singular value", ylabel="relative to the largest")
    axes[0].legend()
    return figure


def plot_entropy(measurements: Measurements) -> Figure | None:
    """Entropy of attention by depth, as a share of its largest possible value."""
    data: dict[str, dict[int, list[float]]] = {label: {} for label in measurements}
    for label, m in measurements.items():
        for one in m.entropies:  # one for each number of keys, which differs between images of different sizes
            data[label].setdefault(m.sites[one.site], []).extend(one.relative.flatten().tolist())
    if not any(data.values()):
        return None
    figure, (axis,) = _grid(["entropy"])
    for label, _, look in _looks(measurements):
        _line_with_band(axis, data[label], look)
    axis.axhline(LOW_ENTROPY, color="#888888", linestyle=":", label="saturated below")
    axis.set(
        xlabel="attention layer", ylabel="share of the largest entropy", ylim=(-0.03, 1.03), title="attention entropy"
    )
    axis.legend()
    return figure


def plot_jacobians(measurements: Measurements) -> Figure | None:
    """Condition numbers of the Jacobians by depth, and the bound of Thm 3.4."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for label, m in measurements.items():
        for one in m.jacobians:
            is_used = (one.output == "C A(X)") == (one.site in m.preconditioned)
            if is_used and math.isfinite(one.extremes.kappa):
                points.setdefault(one.weight, {}).setdefault(label, []).append((m.sites[one.site], one.extremes.kappa))
    if not points:
        return None
    figure, axes = _grid(points)
    for (weight, labelled), axis in zip(sorted(points.items()), axes, strict=True):
        for label, m, look in _looks(measurements):
            axis.scatter(*_columns(labelled.get(label, [])), s=14, color=look["color"], label=label)
            heights = [(m.sites[site], one.value) for (site, _), one in m.bounds.items() if math.isfinite(one.value)]
            axis.scatter(*_columns(heights), s=60, marker="_", color=look["color"], label=f"{label}, bound")
        axis.set(title=f"Jacobian by {weight}", yscale="log", xlabel="attention layer", ylabel="condition number")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside center right")
    return figure


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


PLOTS: dict[str, Callable[[Measurements], Figure | None]] = {
    "kappa_by_depth": plot_depth,
    "heads": plot_heads,
    "singular_values": plot_values,
    "entropy_by_depth": plot_entropy,
    "jacobians": plot_jacobians,
}
"""File name -> function that draws the plot; its docstring is the caption."""


def _grid(panels) -> tuple[Figure, np.ndarray]:
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 0.4 + 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure, axes[: len(panels)]


def _line_with_band(axis: Axes, layers: Mapping[int, Sequence[float]], look: dict[str, str]) -> None:
    """Draw the medians by depth, and a band from the smallest to the largest value."""
    depths = sorted(layers)
    if depths:
        axis.plot(depths, [np.median(layers[d]) for d in depths], marker="o", markersize=3, **look)
        low, high = ([limit(layers[d]) for d in depths] for limit in (np.min, np.max))
        axis.fill_between(depths, low, high, color=look["color"], alpha=0.12, linewidth=0)


def _looks(measurements: Measurements) -> Iterator[tuple[str, Measurement, dict[str, str]]]:
    """Yield each model with the style of its lines, which differs so that overlapping lines can be told apart."""
    for i, (label, measurement) in enumerate(measurements.items()):
        yield label, measurement, dict(color=COLORS[i % len(COLORS)], linestyle=STYLES[i % len(STYLES)], label=label)


def page(measurements: Measurements, pictures: Mapping[str, bytes], title: str, trained: bool) -> str:
    """Return a self-contained HTML page: warnings, plots, and the table of all sites."""
    figures = [
        (str(PLOTS[name].__doc__), base64.b64encode(data).decode(), name != "entropy_by_depth")
        for name, data in pictures.items()
    ]
    left_out = [
        f"{label}: {quantity} of {site}: {reason}"
        for label, measurement in measurements.items()
        for (site, quantity), reason in measurement.left_out.items()
    ]
    lines = summary(measurements)
    template = (Path(__file__).parent / "report.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        warnings=find_warnings(measurements, trained),
        figures=figures,
        header=[title_of(name) for name in lines[0]] if lines else [],
        rows=[[cell(value) for value in row.values()] for row in lines],
        left_out=left_out,
    )


def cell(value: object) -> str:
    """Format a value of :func:`summary` as text."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.3g}"
