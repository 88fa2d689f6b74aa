"""The tables of a study's report."""

import csv
import io
import math
import statistics as mean_and_spread
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .plan import (
    FINAL,
    MARGIN,
    TUNING,
    RunId,
    Study,
    chosen_rates,
    current_grid,
    planned_runs,
    tuned_variants,
    tuning_margin,
)
from .results import FAILED, FINISHED, Record, Results
from .statistics import ALPHA, Comparison, compare_family, paired_ratio, seeds_for

QUANTITIES = {
    "kappa_W_Q": "W_Q",
    "kappa_W_K": "W_K",
    "kappa_W_V": "W_V",
    "kappa_map": "the map",
    "kappa_AX": "A(X)",
    "kappa_CAX": "C A(X)",
    "entropy": "entropy",
    "largest_logit": "largest logit",
}
"""Recorded quantity -> its name in a table; of those that begin with 'kappa', the condition number."""
RATIOS = {
    "kappa_W_Q": "kappa_W_Q",
    "kappa_W_K": "kappa_W_K",
    "kappa_W_V": "kappa_W_V",
    "kappa_AX": "kappa_AX",
    "kappa_CAX": "kappa_AX",
}
"""Condition number of a variant -> that of its reference with which it is compared."""


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
    """Table of variants: scores, learning rate, and when the baseline's level was reached.

    There are no scores before the study is complete, so that nothing is decided by them while it runs.
    """
    rates = chosen_rates(study, results.scores()) or {}
    rows = []
    complete, target = is_complete(study, results), _baseline_level(study, results)
    length = max((step for name in study.variants for one in results.final(name) for step, _ in one.curve), default=0)
    for name in study.variants:
        records = results.final(name)
        values = [final_score(study, record) for record in records if complete]
        rows.append(
            [
                name,
                f"{len(records)} of {len(study.seeds)}",
                f"{mean_and_spread.mean(values):.2f}" if values else "",
                f"{mean_and_spread.stdev(values):.2f}" if len(values) > 1 else "",
                f"{rates[name]:g}" if name in rates else "",
                _reaches(records, target, length) if complete else "",
                str(sum(record.status == FAILED for record in records) or ""),
            ]
        )
    header = [
        "variant",
        "seeds",
        f"mean ({study.unit})",
        "standard deviation",
        "learning rate",
        "reaches baseline after",
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
    return "never"


def comparison_table(family: str, found: Sequence[Comparison], study: Study) -> Table:
    """Table of the comparisons of a family, one row for each."""
    rows = []
    for one in found:
        verdict = one.verdict
        if verdict == "undecided":
            seeds = seeds_for(study.difference, one.deviation, ALPHA / len(found))
            verdict += (
                f": {one.detectable:.2f} could have been detected; {study.difference:g} would need about {seeds} seeds"
            )
        rows.append(
            [
                f"{one.variant} - {one.reference}",
                f"{one.difference:+.2f}",
                f"{one.low:+.2f} to {one.high:+.2f}",
                format_p(one.p),
                f"{one.detectable:.2f}",
                verdict,
            ]
        )
    header = ["comparison", f"difference ({study.unit})", "95 % interval", "p", "detectable", "verdict"]
    return Table(f"Family '{family}'", header, rows)


def format_p(value: float) -> str:
    """Format a p-value for a table."""
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
    margin = tuning_margin(study, scores, grid)
    known = "" if margin is None else f"; {MARGIN:g} standard errors are {study.factor * margin:.2f}"
    return Table(f"Tuning: mean scores in {study.unit}{known}", ["variant", *(f"{rate:g}" for rate in grid)], rows)


def plan_table(study: Study, results: Results) -> Table:
    """Table of the settings that were decided before the first run, and of what ran."""
    header, records = results.header(), results.records().values()
    grid = current_grid(study, results.scores())
    families = "; ".join(
        f"{name}: {', '.join(f'{a} - {b}' for a, b in pairs)}" for name, pairs in study.families.items()
    )
    rows = [
        ["question", study.title + (" (exploratory)" if study.exploratory else "")],
        ["configuration", study.config.name + (f", with {_options(study.options)}" if study.options else "")],
        *([["data", study.data["source"]]] if study.data else []),
        *([["trainings start from", _starts(study, records)]] if study.start else []),
        ["score", f"{study.metric} in {study.unit}, at the last iteration, on data that are used once"],
        ["difference that matters", f"{study.difference:g} {study.unit}"],
        ["families", families],
        ["baseline", study.baseline],
        *[[f"variant {name}", _options(options)] for name, options in study.variants.items()],
        ["seeds", _numbers(study.seeds)],
        ["seeds of the pilot", _numbers(study.pilot_seeds)],
        ["evaluations in a training", str(study.evaluations)],
        ["tuning", _tuning(study)],
        *([["rates tried in the end", ", ".join(f"{rate:g}" for rate in grid)]] if tuned_variants(study) else []),
        ["code", _origins([record.commit for record in records] or [header["commit"]])],
        *[["repeated bit for bit", text] for text in header.get("verified", ())],
        ["packages", _origins([_packages(record.versions) for record in records] or [_packages(header["versions"])])],
    ]
    return Table("Decided beforehand", ["setting", "value"], rows)


def _starts(study: Study, records: Iterable[Record]) -> str:
    """The checkpoint that trainings start from, with the first digits of the SHA-256 of each seed's file."""
    hashes = sorted({(record.run.seed, record.start) for record in records if record.start})
    return study.start["checkpoint"] + "".join(f"; seed {seed}: {digest}" for seed, digest in hashes)


def _tuning(study: Study) -> str:
    rates = ", ".join(f"{rate:g}" for rate in study.grid)
    if not tuned_variants(study):
        return f"none: {study.rate} is {rates}, unless a variant sets it"
    return (
        f"{study.rate} of {rates}, seeds {_numbers(study.tuning_seeds)}; one rate for all variants, except for those "
        f"that are better with another by more than {MARGIN:g} standard errors; if a rate at an end of the grid is "
        f"chosen, the grid grows, to {study.largest_grid} rates at most"
    )


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
        done_finals = sum(run in scores for run in planned if run.stage == FINAL)
        status = (
            f"Incomplete: {done} of {total} runs are finished, {done_finals} of them final ones; there are no "
            "comparisons before all of them are."
        )
    origins = [record.origin for record in results.records().values() if record.origin]
    status += "".join(
        f" {origins.count(name)} of the runs were taken over from {name}, which had run the same trainings."
        for name in sorted(set(origins))
    )
    grid, rates = current_grid(study, scores), chosen_rates(study, scores) or {}
    if ends := [name for name in tuned_variants(study) if rates.get(name) in (grid[0], grid[-1])]:
        status += f" The learning rate of {', '.join(ends)} is at an end of the largest grid that was allowed."
    failed = [f"{run} ({record.error})" for run, record in results.records().items() if record.status == FAILED]
    if failed:
        status += f" Failed, and counted with their last score: {'; '.join(failed)}."
    tuning = [tuning_table(study, results)] if tuned_variants(study) else []
    spectra = spectra_tables(study, results) if is_complete(study, results) else []
    return [plan_table(study, results), *found, variant_table(study, results), *tuning, *spectra], status


def spectra_tables(study: Study, results: Results) -> list[Table]:
    """Tables of what was measured of attention at the end of the final runs, and of ratios of condition numbers.

    The first has means over the seeds, of condition numbers geometric ones, and what the preconditioner changes in one
    network: the condition number of C A(X) over that of A(X). The second has the ratios of
    :data:`RATIOS`, paired over seeds. There are no tables without measurements.
    """
    last = {name: [_at_the_end(record) for record in results.final(name)] for name in study.variants}
    found = [q for q in QUANTITIES if any(q in values for runs in last.values() for values in runs)]
    if not found:
        return []
    rows = []
    for name, runs in last.items():
        columns = [[values[q] for values in runs if q in values] for q in found]
        within = [v["kappa_CAX"] / v["kappa_AX"] for v in runs if v.get("kappa_AX") and "kappa_CAX" in v]
        means = [_mean(q, column) for q, column in zip(found, columns, strict=True)]
        rows.append([name, *means, _mean("kappa_CAX", within)])
    ratios = [[f"{a} / {b}", *_ratios(last[a], last[b])] for a, b in _pairs(study)]
    names = {
        (q, r): QUANTITIES[q] + ("" if q == r else f" / {QUANTITIES[r]} of the reference") for q, r in RATIOS.items()
    }
    return [
        Table(
            "Condition numbers, entropy and largest logit at the end of the training",
            ["variant", *(QUANTITIES[q] for q in found), "C A(X) / A(X), same network"],
            rows,
        ),
        Table("Ratios of condition numbers at the end of the training", ["comparison", *names.values()], ratios),
    ]


def _pairs(study: Study) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pair for pairs in study.families.values() for pair in pairs))


def _at_the_end(record: Record) -> dict[str, float]:
    """What was measured after the last iteration of a run; nothing of a run that failed."""
    end = record.curve[-1][0] if record.curve and record.status == FINISHED else None
    return {quantity: values[-1][1] for quantity, values in record.spectra.items() if values and values[-1][0] == end}


def _mean(quantity: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    if quantity in ("entropy", "largest_logit"):
        return f"{mean_and_spread.mean(values):.3g}"
    return f"{mean_and_spread.geometric_mean(values):.3g}" if all(0 < v < math.inf for v in values) else ""


def _ratios(variant: Sequence[dict[str, float]], reference: Sequence[dict[str, float]]) -> list[str]:
    cells = []
    for quantity, other in RATIOS.items():
        both = [
            (a[quantity], b[other]) for a, b in zip(variant, reference, strict=True) if quantity in a and other in b
        ]
        usable = len(both) > 1 and all(0 < value < math.inf for pair in both for value in pair)
        ratio, low, high = paired_ratio(*zip(*both, strict=True)) if usable else (math.nan,) * 3
        pairs = "" if len(both) == len(variant) else f", {len(both)} seeds"
        cells.append(f"{ratio:.3g} ({low:.3g} to {high:.3g}{pairs})" if usable else "")
    return cells


def csv_text(study: Study, results: Results) -> str:
    """Format variants and comparisons as CSV, with scores in :attr:`.plan.Study.unit`.

    There is a line for each comparison, and one for each variant that is compared with none. The columns of scores and
    comparisons are empty before the study is complete.
    """
    complete = is_complete(study, results)
    found = comparisons(study, results) if complete else {}
    compared = {(family, one.variant, one.reference): one for family, ones in found.items() for one in ones}
    pairs = [(family, *pair) for family, ones in study.families.items() for pair in ones]
    alone = [("", name, "") for name in study.variants if name not in {variant for _, variant, _ in pairs}]
    table = variant_table(study, results)
    variants = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            *("variant", "seeds", "mean", "standard_deviation", "learning_rate", "reaches_baseline_after", "failed"),
            *("family", "reference", "difference", "low", "high", "p", "detectable", "verdict"),
        ]
    )
    for family, variant, reference in (*alone, *pairs):
        records = results.final(variant)
        scores = [final_score(study, record) for record in records if complete]
        one = compared.get((family, variant, reference))
        numbers = (one.difference, one.low, one.high, one.p, one.detectable) if one else ()
        writer.writerow(
            [
                variant,
                len(records),
                f"{mean_and_spread.mean(scores):.6g}" if scores else "",
                f"{mean_and_spread.stdev(scores):.6g}" if len(scores) > 1 else "",
                *(variants[variant][column] for column in ("learning rate", "reaches baseline after")),
                sum(record.status == FAILED for record in records),
                *(family, reference),
                *([f"{number:.6g}" for number in numbers] or [""] * 5),
                one.verdict if one else "",
            ]
        )
    return text.getvalue()
