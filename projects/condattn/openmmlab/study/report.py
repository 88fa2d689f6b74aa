"""Reports of a study as Markdown, CSV, figures and an HTML page; equal data give equal files, byte for byte."""

import csv
import io
import math
import re
import statistics as mean_and_spread
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from mmengine.config import Config

from ...weights.atomic import write_whole
from .figures import draw_curves, draw_differences, draw_spectra
from .plan import (
    FINAL,
    TUNING,
    RunId,
    Study,
    chosen_rates,
    current_grid,
    load_study,
    planned_runs,
    tuned_variants,
)
from .results import FAILED, Record, Results
from .statistics import ALPHA, POWER, Comparison, compare_family, detectable_difference, pool, seeds_for

TEMPLATE = Path(__file__).with_name("report.html")
POOLED = "pooled"
"""Marker of the section of docs/results.md about all studies."""
POOLING = (
    "An estimate needs two or more complete studies. Points of accuracy, AP and mIoU are pooled as they are; "
    "exploratory studies are left out."
)
"""Below the table in that section."""
FIGURE = "differences.svg"
"""Name of the figure in that section."""
METHODS = ("pc", "sc")
"""Variants, compared with 'none', of which there is an estimate over all studies."""


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Format the table as Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def is_complete(study: Study, results: Results) -> bool:
    """Whether every run that the study needs has finished or failed."""
    scores = results.scores()
    return chosen_rates(study, scores) is not None and all(run in scores for run in planned_runs(study, scores))


def final_score(study: Study, record: Record) -> float:
    """Score of a final run in the comparisons: from the final evaluation, or the last score before it failed."""
    return study.factor * record.reported.get(study.metric, record.score)


def comparisons(study: Study, results: Results) -> dict[str, list[Comparison]]:
    """Family -> comparisons; only valid for a complete study."""
    scores = {name: [final_score(study, record) for record in results.final(name)] for name in study.variants}
    return {family: compare_family(scores, pairs, study.difference) for family, pairs in study.families.items()}


def variant_table(study: Study, results: Results) -> Table:
    """Table of variants: scores over the seeds so far, learning rate, and when the baseline's level was reached."""
    rates = chosen_rates(study, results.scores()) or {}
    rows = []
    target = _baseline_level(study, results)
    length = max((step for record in results.final(study.baseline) for step, _ in record.curve), default=0)
    for name in study.variants:
        records = results.final(name)
        values = [final_score(study, record) for record in records]
        rows.append(
            [
                name,
                f"{len(values)} of {len(study.seeds)}",
                f"{mean_and_spread.mean(values):.2f}" if values else "",
                f"{mean_and_spread.stdev(values):.2f}" if len(values) > 1 else "",
                f"{rates[name]:g}" if name in rates else "",
                _reaches(records, target, length),
                str(sum(record.status == FAILED for record in records) or ""),
            ]
        )
    header = [
        "variant",
        "seeds",
        f"mean ({study.unit})",
        "standard deviation",
        "learning rate",
        "meets baseline at",
        "failed",
    ]
    return Table("Variants", header, rows)


def _baseline_level(study: Study, results: Results) -> float | None:
    """The baseline's mean score in its last evaluation on the tuning data."""
    scores = [record.score for record in results.final(study.baseline)]
    return mean_and_spread.mean(scores) if scores else None


def _reaches(records: Sequence[Record], target: float | None, length: float) -> str:
    """Fraction of the ``length`` of the training after which the mean curve first reaches ``target``, as text."""
    steps = sorted({step for record in records for step, _ in record.curve})
    if not steps or target is None:
        return ""
    curves = [dict(record.curve_over(steps)) for record in records]
    for step in steps:
        if mean_and_spread.mean(curve[step] for curve in curves if step in curve) >= target - 1e-12:
            return f"{step / length:.0%}"
    return "not"


def comparison_table(family: str, found: Sequence[Comparison], study: Study) -> Table:
    """Table of the comparisons of a family, one row for each."""
    rows = []
    for one in found:
        verdict = one.verdict
        if verdict == "undecided":
            seeds = seeds_for(study.difference, one.deviation, ALPHA / len(found))
            verdict += f": could have seen {one.detectable:.2f}; {study.difference:g} would take {seeds} seeds"
        rows.append(
            [
                f"{one.variant} - {one.reference}",
                f"{one.difference:+.2f}",
                f"{one.low:+.2f} to {one.high:+.2f}",
                _p(one.p),
                f"{one.detectable:.2f}",
                verdict,
            ]
        )
    header = ["comparison", f"difference ({study.unit})", "95 % interval", "p", "detectable", "verdict"]
    return Table(f"Family '{family}'", header, rows)


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 else "< 0.0001"


def tuning_table(study: Study, results: Results) -> Table:
    """Table of the tuning: the mean score of each variant that is tuned with each learning rate."""
    grid, scores, rows = current_grid(study, results.scores()), results.scores(), []
    for name in tuned_variants(study):
        cells = []
        for rate in grid:
            runs = [RunId(TUNING, name, seed, rate) for seed in study.tuning_seeds]
            found = [study.factor * scores[run] for run in runs if run in scores]
            cells.append(f"{mean_and_spread.mean(found):.2f}" if len(found) == len(runs) else "")
        rows.append([name, *cells])
    return Table(f"Tuning: mean scores in {study.unit}", ["variant", *(f"{rate:g}" for rate in grid)], rows)


def plan_table(study: Study, results: Results) -> Table:
    """Table of the settings that were decided before the first run."""
    header, records = results.header(), results.records().values()
    grid = current_grid(study, results.scores())
    families = "; ".join(
        f"{name}: {', '.join(f'{a} - {b}' for a, b in pairs)}" for name, pairs in study.families.items()
    )
    options = [[f"variant {name}", _options(options)] for name, options in study.variants.items()]
    rows = [
        ["question", study.title],
        ["configuration", study.config.name + (f", with {_options(study.options)}" if study.options else "")],
        ["score", f"{study.metric} in {study.unit}, at the last iteration, on data that are used once"],
        ["difference that matters", f"{study.difference:g} {study.unit}"],
        ["seeds", _numbers(study.seeds)],
        ["tuning", _tuning(study)],
        ["families", families],
        *options,
        *([["rates tried in the end", ", ".join(f"{rate:g}" for rate in grid)]] if tuned_variants(study) else []),
        ["code", _origins([record.commit for record in records] or [header["commit"]])],
        *[["repeated bit for bit", text] for text in header.get("verified", ())],
        ["packages", _origins([_packages(record.versions) for record in records] or [_packages(header["versions"])])],
    ]
    return Table("Decided beforehand", ["", ""], rows)


def _tuning(study: Study) -> str:
    rates = ", ".join(f"{rate:g}" for rate in study.grid)
    if not tuned_variants(study):
        return f"none: {study.rate} is {rates}, unless a variant sets it"
    return f"{study.rate} of {rates}, seeds {_numbers(study.tuning_seeds)}"


def _packages(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _origins(found: Sequence[str]) -> str:
    """What all runs have in common, or each of several with the number of its runs."""
    numbers = Counter(found)
    return found[0] if len(numbers) == 1 else "; ".join(f"{name} ({number} runs)" for name, number in numbers.items())


def _numbers(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _options(options: dict) -> str:
    return ", ".join(f"{key} = {value}" for key, value in options.items())


def tables(study: Study, results: Results) -> tuple[list[Table], str]:
    """Make all tables of a report, and a sentence on how complete the study is."""
    scores = results.scores()
    planned = planned_runs(study, scores)
    done = sum(run in scores for run in planned)
    if is_complete(study, results):
        found = [comparison_table(name, family, study) for name, family in comparisons(study, results).items()]
        status = f"Complete: {done} runs."
    else:
        found = []
        finals = len(study.variants) * len(study.seeds)
        total = sum(run.stage != FINAL for run in planned) + finals
        status = f"Incomplete: {done} of {total} runs are finished; there are no comparisons before all of them are."
    origins = [record.origin for record in results.records().values() if record.origin]
    status += "".join(
        f" {origins.count(name)} of the runs are those of {name}, the same trainings." for name in sorted(set(origins))
    )
    grid, rates = current_grid(study, scores), chosen_rates(study, scores) or {}
    if ends := [name for name in tuned_variants(study) if rates.get(name) in (grid[0], grid[-1])]:
        status += f" The learning rate of {', '.join(ends)} is at an end of the largest grid that was allowed."
    failed = [f"{run} ({record.error})" for run, record in results.records().items() if record.status == FAILED]
    if failed:
        status += f" Failed, and counted with their last score: {'; '.join(failed)}."
    tuning = [tuning_table(study, results)] if tuned_variants(study) else []
    return [*found, variant_table(study, results), *tuning, plan_table(study, results)], status


NOTES = (
    "Intervals and p are over seeds on one fixed split of the data, not over data. p is two-sided, of paired t tests, "
    "with Holm's correction within the family; intervals hold for the whole family at once (Bonferroni), so that an "
    "interval may contain 0 where Holm's less strict p is below 0.05. 'detectable' is the difference that a comparison "
    f"with this spread finds in {POWER:.0%} of the cases. 'meets baseline at' is the first of the evenly spaced "
    "evaluations, on the data that tune, at which the mean reaches the baseline's last one. Failed runs count with "
    "their last score."
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
        parts.append("## Learning curves\n\n![score on the data that tune, mean and standard deviation](curves.svg)")
    if spectra:
        parts.append("## Condition numbers and entropy\n\n![medians over attention sites](spectra.svg)")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    contents = {
        "report.md": "\n\n".join(parts) + "\n",
        "table.csv": _csv(found),
        "report.html": page.render(
            title=study.title, status=status, notes=NOTES, tables=found, curves=curves, spectra=spectra
        )
        + "\n",
    }
    contents |= {name: figure for name, figure in (("curves.svg", curves), ("spectra.svg", spectra)) if figure}
    return [_write(results.folder / name, text) for name, text in contents.items()]


def _csv(found: Sequence[Table]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for table in found:
        writer.writerows([[table.title], table.header, *table.rows, []])
    return text.getvalue()


def _write(path: Path, text: str) -> Path:
    write_whole(path, lambda part: part.write_text(text), overwrite=True)
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
        f"a family of {size}, differences of {visible:.2f} are found in {POWER:.0%} of the cases, if seeds have "
        "nothing in common between variants"
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
    """All studies of configs/studies, in all sizes, that have been started."""
    found = []
    for path in sorted((root / "configs" / "studies").glob("*.py")):
        for size in Config.fromfile(path).get("sizes") or {"": {}}:
            study = load_study(str(path), size)
            results = Results(study, root)
            if results.started and results.header():
                found.append((study, results.snapshot()))
    return found


def _summary(study: Study, results: Results) -> str:
    found, status = tables(study, results)
    parts = [f"{status} [Report](../results/{study.name}/report.md)"]
    if any(map(results.final, study.variants)):
        parts += [table.markdown() for table in found if table.title.startswith(("Family", "Variants"))]
        parts.append(f"![learning curves](../results/{study.name}/curves.svg)")
    return "\n\n".join(parts)


def counts(study: Study, results: Results) -> bool:
    """Whether a study enters the estimate over all studies: it is complete and not exploratory."""
    return not study.exploratory and is_complete(study, results)


def effects(study: Study, results: Results) -> dict[str, Comparison]:
    """Name of a method -> its comparison with no conditioning, in a complete study; empty if it compares others."""
    found = {
        one.variant: one for family in comparisons(study, results).values() for one in family if one.reference == "none"
    }
    return {name: found[name] for name in METHODS if name in found}


def pooled_table(found: Sequence[tuple[Study, Results]]) -> Table:
    """Table of methods: the effect of each against the baseline, pooled over complete studies that compare it.

    Exploratory studies are left out.
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
                _p(one.p),
                f"{one.tau:.2f}",
            ]
        )
    header = ["method", "complete studies", "difference (points)", "95 % interval", "p", "deviation between studies"]
    return Table("All studies", header, rows)
