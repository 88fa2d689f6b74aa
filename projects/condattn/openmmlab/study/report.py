"""Reports of a study as Markdown, CSV, figures and an HTML page; equal data give equal files, byte for byte."""

import math
import re
import statistics as mean_and_spread
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from ...weights.atomic import write_atomically
from ..errors import UserError
from .figures import draw_curves, draw_differences, draw_spectra
from .plan import Study, load_study, sizes_of
from .results import FAILED, Results
from .statistics import ALPHA, POWER, Comparison, detectable_difference, pool
from .tables import Table, comparisons, csv_text, format_p, is_complete, tables

TEMPLATE = Path(__file__).with_name("report.html")
POOLED = "pooled"
"""Marker of the section of docs/results.md about all studies."""
POOLING = (
    "An estimate needs two or more complete studies. Points of accuracy, AP and mIoU are averaged as if they were one "
    "unit. With few studies the standard deviation between them is very uncertain: 0.00 does not show that they agree. "
    "The estimate is recomputed after each study, without a correction for repeated testing. Exploratory studies are "
    "left out."
)
"""Below the table in that section."""
FIGURE = "differences.svg"
"""Name of the figure in that section."""
MAIN = "methods"
"""The family of a study that compares methods with 'none', of which there are estimates over all studies."""

NOTES = (
    "Intervals and p are over seeds on one fixed split of the data, not over data. p is two-sided, of paired t tests, "
    "with Holm's correction within the family; intervals hold for the whole family at once (Bonferroni), so that an "
    "interval may contain 0 where Holm's less strict p is below 0.05. 'detectable' is the difference that a comparison "
    f"with this spread finds in {POWER:.0%} of the cases. 'reaches baseline after' is the part of the training after "
    "which the mean score on the tuning set, evaluated at evenly spaced iterations, first reaches the baseline's last "
    "one. Failed runs count with their last score, which is of the tuning set. Nothing is corrected across families or "
    "studies. Condition numbers (the largest singular value divided by the smallest nonzero one), the entropy (as a "
    "share of the largest possible one) and the largest logit are medians over the attention sites, on one training "
    "image of each run; over the seeds, means of condition numbers are geometric. Their ratios have 95 % intervals "
    "over seeds without a correction, because no comparison of them was planned. C A(X) is what the preconditioner "
    "makes of the head outputs A(X), or, in a variant without one, what it would make of them."
)


def write_report(study: Study, results: Results) -> list[Path]:
    """Write report.md, table.csv, the figures and report.html into the folder of the results.

    Returns:
        Paths of the written files.
    """
    results = results.snapshot()
    found, status = tables(study, results)
    curves = draw_curves(study, results)
    spectra = draw_spectra(study, results)
    parts = [f"# {study.title}", status, NOTES]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in found]
    if curves:
        parts.append("## Learning curves\n\n![score on the tuning set, mean and standard deviation](curves.svg)")
    if spectra:
        parts.append("## Condition numbers and entropy\n\n![medians over attention sites](spectra.svg)")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    contents = {
        "report.md": "\n\n".join(parts) + "\n",
        "table.csv": csv_text(study, results),
        "report.html": page.render(
            title=study.title, status=status, notes=NOTES, tables=found, curves=curves, spectra=spectra
        )
        + "\n",
    }
    contents |= {name: figure for name, figure in (("curves.svg", curves), ("spectra.svg", spectra)) if figure}
    return [_write(results.folder / name, text) for name, text in contents.items()]


def _write(path: Path, text: str) -> Path:
    write_atomically(path, lambda part: part.write_text(text), overwrite=True)
    return path


def report_pilot(study: Study, results: Results) -> str:
    """Summarise the pilot: the gain in the last fifth of the training, and the difference that the study can detect."""
    records = [r for run, r in sorted(results.records().items()) if run.stage == "pilot"]
    if len(records) < 2:
        return f"pilot of {study.name}: {len(records)} of {len(study.pilot_seeds)} runs"
    failed = [record for record in records if record.status == FAILED]
    steps = sorted({step for record in records for step, _ in record.curve})
    if not steps:
        return f"pilot of {study.name}: all {len(records)} runs failed: {records[0].error}"
    curves = [[study.factor * value for _, value in record.curve_over(steps)] for record in records]
    fifth = max(1, round(study.evaluations / 5))
    gain = mean_and_spread.mean(curve[-1] - curve[max(-1 - fifth, -len(curve))] for curve in curves)
    deviation = mean_and_spread.stdev(curve[-1] for curve in curves)
    size = max(len(pairs) for pairs in study.families.values())
    seeds = len(study.seeds)
    visible = detectable_difference(math.sqrt(2) * deviation, seeds, ALPHA / size)
    finals = ", ".join(f"{curve[-1]:.2f}" for curve in curves)
    return (
        f"pilot of {study.name}: {len(records)} seeds of {study.baseline}; final scores {finals} {study.unit}, "
        f"standard deviation {deviation:.2f}; the last fifth of the training gains {gain:.2f}; with {seeds} seeds and "
        f"a family of {size}, differences of {visible:.2f} are found in {POWER:.0%} of the cases, if the scores "
        "of two variants with the same seed are uncorrelated"
        + "".join(f"; seed {record.run.seed} failed: {record.error}" for record in failed)
    )


def write_documents(root: Path) -> list[Path]:
    """Update the tables of docs/results.md, between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and its figure.

    Returns:
        Paths of the written files; empty if there is no docs/results.md.
    """
    path = root / "docs" / "results.md"
    if not path.is_file():
        return []
    text = path.read_text()
    found = begun_studies(root)
    summaries = {study.name: _summary(study, results) for study, results in found}
    for name in re.findall(r"<!-- begin (.+?) -->", text):
        text = _fill(text, name, summaries.get(name, "No run is finished yet."))
    pooled, written = f"{pooled_table(found).markdown()}\n\n{POOLING}", []
    differences = [(study, [*effects(study, results).values()]) for study, results in found if counts(study, results)]
    if any(family for _, family in differences):
        pooled += f"\n\n![differences with their intervals]({FIGURE})"
        written.append(_write(path.with_name(FIGURE), draw_differences(differences)))
    return [_write(path, _fill(text, POOLED, pooled)), *written]


def _fill(text: str, name: str, content: str) -> str:
    pattern = rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)


def begun_studies(root: Path) -> list[tuple[Study, Results]]:
    """All studies of configs/studies, in all sizes, that have been started; those that cannot be read are left out.

    A warning names a study that is left out.
    """
    found = []
    for path in sorted((root / "configs" / "studies").glob("*.py")):
        try:
            for size in sizes_of(str(path)):
                study = load_study(str(path), size)
                results = Results(study, root)
                if results.started and results.header():
                    found.append((study, results.snapshot()))
        except UserError as error:
            print(f"warning: {path.name} is left out of docs/results.md: {error}", file=sys.stderr)
    return found


def _summary(study: Study, results: Results) -> str:
    found, status = tables(study, results)
    parts = [f"{status} [Report](../results/{study.name}/report.md)"]
    if is_complete(study, results):
        shown = [table for table in found if table.title.startswith(("Family", "Variants"))]
        parts += [f"**{table.title}**\n\n{table.markdown()}" for table in shown]
        parts.append(f"![learning curves](../results/{study.name}/curves.svg)")
    return "\n\n".join(parts)


def counts(study: Study, results: Results) -> bool:
    """Whether a study enters the estimate over all studies: it is complete and not exploratory."""
    return not study.exploratory and is_complete(study, results)


def effects(study: Study, results: Results) -> dict[str, Comparison]:
    """Variant -> its comparison with no conditioning, in a complete study; empty if that is not its question."""
    if MAIN not in study.families:
        return {}
    return {one.variant: one for one in comparisons(study, results)[MAIN] if one.reference == "none"}


def pooled_table(found: Sequence[tuple[Study, Results]]) -> Table:
    """Table of methods: the effect of each against no conditioning, pooled over the complete studies that compare it.

    Variants of equal names are the same method. Exploratory studies are left out.
    """
    estimates: dict[str, list[tuple[float, float]]] = {}
    for study, results in found:
        for name, one in effects(study, results).items() if counts(study, results) else ():
            if one.deviation > 0:
                estimates.setdefault(name, []).append((one.difference, one.deviation**2 / one.seeds))
    rows = []
    for name, values in estimates.items():
        if len(values) < 2:
            rows.append([name, str(len(values)), "", "", "", ""])
            continue
        one = pool([effect for effect, _ in values], [variance for _, variance in values])
        rows.append(
            [
                name,
                str(one.studies),
                f"{one.estimate:+.2f}",
                f"{one.low:+.2f} to {one.high:+.2f}",
                format_p(one.p),
                f"{one.tau:.2f}",
            ]
        )
    header = [
        "method",
        "complete studies",
        "difference (points)",
        "95 % interval",
        "p",
        "standard deviation between studies",
    ]
    return Table("All studies", header, rows)
