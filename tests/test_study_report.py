"""Reports of studies: the same every time, the page of all results, failed runs, and results that cannot be read."""

import csv
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from runs import ROOT

pytest.importorskip("mmpretrain")

from tiny_study import a_record, finish

from condattn.openmmlab.errors import UserError
from condattn.openmmlab.study import figures
from condattn.openmmlab.study.plan import FINAL, RunId, load_study
from condattn.openmmlab.study.report import begun_studies, report_pilot, write_documents, write_report
from condattn.openmmlab.study.results import FAILED, Record, Results
from condattn.openmmlab.study.tables import _reaches as reaches
from condattn.openmmlab.study.tables import is_complete


def test_reports_are_the_same_every_time(study_file, tmp_path):
    study = load_study(study_file(("grid=[1e-4, 1e-3]", "grid=[1e-4, 1e-3, 1e-2]")))
    results = Results(study, tmp_path)
    results.write_header(commit="abc", versions={"torch": "2.11"})
    write_report(study, results)
    assert "Incomplete: 0 of" in (results.folder / "report.md").read_text()
    assert not any(text in (results.folder / "report.md").read_text() for text in ("Family", "Learning curves"))
    finish(results, {"none": 50.0, "pc": 70.0})
    assert is_complete(study, results)
    files = write_report(study, results)
    before = {path: path.read_bytes() for path in files}
    text = (results.folder / "report.md").read_text()
    assert "Complete: 16 runs" in text and "| pc - none | +21.00 | +8.29 to +33.71 | 0.0303 |" in text
    assert (
        "| none | 2 of 2 | 52.00 | 0.00 | 0.001 | 100% |" in text and "| pc | 2 of 2 | 73.00 | 1.41 | 0.001 |" in text
    )
    # two tuning scores of pc differ by 2, those of none by 0: the median variance is 1, its median share of chi2 0.455
    assert "## Tuning: mean scores in points; 2 standard errors are 2.97\n" in text
    page = (results.folder / "report.html").read_text()
    assert page.count("<svg") == 1 and "http" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    assert {path: path.read_bytes() for path in write_report(study, results)} == before


def test_the_table_as_csv(study_file, tmp_path):
    """One line for each variant or comparison, with numbers in separate columns."""
    study = load_study(study_file(("grid=[1e-4, 1e-3]", "grid=[1e-4, 1e-3, 1e-2]")))
    results = Results(study, tmp_path)
    results.write_header(commit="abc", versions={})
    write_report(study, results)
    with (results.folder / "table.csv").open() as file:
        assert [row["difference"] for row in csv.DictReader(file)] == ["", ""]
    finish(results, {"none": 50.0, "pc": 70.0})
    write_report(study, results)
    with (results.folder / "table.csv").open() as file:
        none, pc = csv.DictReader(file)
    assert (none["variant"], none["mean"], none["reference"], none["difference"]) == ("none", "52", "", "")
    numbers = {"seeds": 2, "mean": 73, "standard_deviation": 1.41421, "learning_rate": 0.001, "failed": 0}
    numbers |= {"difference": 21, "low": 8.2938, "high": 33.7062, "p": 0.0302914}
    assert {name: float(pc[name]) for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert (pc["family"], pc["reference"], pc["verdict"]) == ("methods", "none", "helps")


def test_what_was_decided_beforehand_is_first(study_file, tmp_path):
    study = load_study(study_file())
    results = Results(study, tmp_path)
    results.write_header(commit="abc", versions={})
    finish(results, {"none": 50.0, "pc": 70.0})
    write_report(study, results)
    text = (results.folder / "report.md").read_text()
    titles = re.findall("^## (.*)", text, flags=re.MULTILINE)
    assert titles[:3] == ["Decided beforehand", "Family 'methods'", "Variants"]
    for row in ("baseline | none", "seeds of the pilot | 7", "evaluations in a training | 2", "data | the test writes"):
        assert f"| {row}" in text
    assert "by more than 2 standard errors" in text and "to 2 rates at most" in text


def test_condition_numbers_at_the_end(study_file, tmp_path):
    """Geometric means over the seeds, and ratios paired over seeds, of the last measurement alone."""
    study = load_study(study_file())
    results = Results(study, tmp_path)
    results.write_header(commit="abc", versions={})
    finish(results, {"none": 50.0, "pc": 70.0})
    for variant, factor in (("none", 1.0), ("pc", 3.0)):
        for record in results.final(variant):
            value = factor * 10.0 ** (record.run.seed + 1)
            spectra = {"kappa_AX": [[2, 5.0], [4, value]], "kappa_CAX": [[4, value / 2]], "entropy": [[4, 0.5]]}
            results.add(replace(record, spectra=spectra))
    write_report(study, results)
    text = (results.folder / "report.md").read_text()
    assert "| variant | A(X) | C A(X) | entropy | C A(X) / A(X), same network |" in text
    assert "| none | 31.6 | 15.8 | 0.5 | 0.5 |" in text and "| pc | 94.9 | 47.4 | 0.5 | 0.5 |" in text
    assert "| pc / none |  |  |  | 3 (3 to 3) | 1.5 (1.5 to 1.5) |" in text


def test_final_runs_of_other_rates_do_not_count(study_file, tmp_path):
    study = load_study(study_file())
    results = Results(study, tmp_path)
    results.write_header(commit="abc", versions={})
    finish(results, {"none": 50.0, "pc": 70.0})
    before = results.final("pc")
    results.add(a_record(RunId(FINAL, "pc", 0, 1e-2), 99.0))
    assert results.final("pc") == before


def test_the_page_of_results(study_file, tmp_path):
    """The estimate over all studies and its figure appear when the first study is complete."""
    studies = tmp_path / "configs" / "studies"
    study_file()
    shutil.copytree(tmp_path / "_base_", studies / "_base_")
    shutil.move(tmp_path / "tiny.py", studies)
    results = Results(load_study(str(studies / "tiny.py")), tmp_path)
    results.write_header(commit="abc", versions={"torch": "2.11"})
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("tiny", "later", "pooled")))
    assert write_documents(tmp_path) == [page]
    assert page.read_text().startswith("<!-- begin tiny -->\nIncomplete: 0 of 12 runs")
    assert (
        "\n<!-- begin later -->\nNo run is finished yet.\n<!-- end later -->" in page.read_text()
        and "svg)\n<!-- end pooled" not in page.read_text()
    )
    finish(results, {"none": 50.0, "pc": 70.0})
    figure = page.with_name("differences.svg")
    assert write_documents(tmp_path) == [page, figure]
    assert "| pc | 1 |" in page.read_text() and "(differences.svg)\n<!-- end pooled -->" in page.read_text()
    assert "tiny, pc, 2 seeds" in figure.read_text()


def test_failed_runs_are_counted_and_named(study_file, tmp_path):
    study = load_study(study_file(("grid=[1e-4, 1e-3]", "grid=[1e-4, 1e-3, 1e-2]")))
    results = Results(study, tmp_path)
    results.write_header(commit="abc", versions={})
    finish(results, {"none": 50.0, "pc": 70.0})
    results.add(a_record(RunId(FINAL, "pc", 1, 1e-3), 0.0, status=FAILED, error="loss is not finite"))
    write_report(study, results)
    text = (results.folder / "report.md").read_text()
    assert "| pc | 2 of 2 | 36.00 |" in text and text.count("| 1 |") == 1
    assert "loss is not finite" in text


def test_a_baseline_that_failed_before_its_first_evaluation(study_file, tmp_path):
    study = load_study(study_file())
    results = Results(study, tmp_path)
    results.write_header(commit="abc", versions={})
    finish(results, {"none": 50.0, "pc": 70.0})
    for seed in study.seeds:
        run = next(one.run for one in results.final("none") if one.run.seed == seed)
        results.add(replace(a_record(run, 0.0, status=FAILED, error="loss is not finite"), curve=[]))
    write_report(study, results)
    text = (results.folder / "report.md").read_text()
    assert (
        "| none | 2 of 2 | 0.00 | 0.00 | 0.001 |  | 2 |" in text
        and "| pc | 2 of 2 | 73.00 | 1.41 | 0.001 | 50% |" in text
    )


def test_results_of_another_study(study_file, tmp_path):
    results = Results(load_study(study_file()), tmp_path)
    results.write_header(commit="abc", versions={})
    other = Results(load_study(study_file(("difference = 5.0", "difference = 4.0"))), tmp_path)
    with pytest.raises(UserError, match="written by another study.*a study that has begun is not changed"):
        other.header()


def test_broken_results(study_file, tmp_path):
    results = Results(load_study(study_file()), tmp_path)
    results.folder.mkdir(parents=True)
    for line, message in (('{"run"', "cannot be read as JSON"), ("{}", "not the record of a run"), ("[]", "object")):
        (results.folder / "runs.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=message):
            results.records()


def is_under_way() -> bool:
    """Whether there are records that are not committed: a study that runs writes its report in the end."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=all", "--", "results"]
    return "runs.jsonl" in subprocess.run(command, capture_output=True, text=True).stdout


def test_the_results_in_this_repository(tmp_path, monkeypatch):
    """Tables equal those made from the data, byte for byte; figures depend on the version of Matplotlib."""
    monkeypatch.setattr(figures, "_svg", lambda figure: "<svg/>")
    folders = ("configs", "results", "docs")
    if is_under_way():
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD", *folders], capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    else:
        for name in folders:
            shutil.copytree(ROOT / name, tmp_path / name)
    pages = [*tmp_path.glob("results/*/report.md"), *tmp_path.glob("results/*/table.csv"), tmp_path / "docs/results.md"]
    before = {path: path.read_bytes() for path in pages}
    studies = begun_studies(tmp_path)
    assert len(studies) > 5
    for study, results in studies:
        write_report(study, results)
    write_documents(tmp_path)
    assert [path for path in before if path.read_bytes() != before[path]] == [], "run --report-only of their studies"


def test_curves_are_compared_at_equal_iterations(study_file):
    """A lost evaluation leaves a gap; a failed run keeps its last score, 0 if it has none."""
    run = RunId(FINAL, "pc", 0, 1e-3)
    gap = Record(run, "finished", 4.0, {}, [[2, 2.0], [6, 4.0]])
    failed = Record(run, FAILED, 1.0, {}, [[2, 1.0]])
    nothing = Record(run, FAILED, 0.0, {}, [])
    assert gap.curve_over([2, 4, 6]) == [(2, 2.0), (6, 4.0)]
    assert failed.curve_over([2, 4, 6]) == [(2, 1.0), (4, 1.0), (6, 1.0)]
    assert nothing.curve_over([2, 4]) == [(2, 0.0), (4, 0.0)]
    whole = Record(run, "finished", 3.0, {}, [[2, 1.0], [4, 2.0], [6, 3.0]])
    assert reaches([whole, gap], 2.0, 6) == "67%"
    assert reaches([whole, nothing], 2.0, 6) == "never"
    assert reaches([failed], 1.0, 8) == "25%"
    assert reaches([nothing], 0.0, 6) == "" and reaches([whole], None, 6) == ""


def test_the_pilot(study_file, tmp_path):
    study = load_study(
        study_file(("pilot_seeds = [7, 8]", "pilot_seeds = [7, 8, 9]"), ("evaluations = 2", "evaluations = 1"))
    )
    results = Results(study, tmp_path, pilot=True)
    runs = [RunId("pilot", "none", seed, 1e-3) for seed in study.pilot_seeds]
    results.add(a_record(runs[0], 50.0))
    assert "1 of 3 runs" in report_pilot(study, results)
    results.add(a_record(runs[1], 60.0))
    assert "2 seeds of none; final scores 50.00, 60.00 points" in report_pilot(study, results)
    assert "the last fifth of the training gains 1.00" in report_pilot(study, results)
    results.add(Record(runs[2], FAILED, 0.0, {}, [], error="loss is not finite in iteration 1"))
    assert report_pilot(study, results).endswith("; seed 9 failed: loss is not finite in iteration 1")
    for run in runs:
        results.add(Record(run, FAILED, 0.0, {}, [], error="loss is not finite in iteration 1"))
    assert "all 3 runs failed: loss is not finite" in report_pilot(study, results)


def test_the_report_names_code_and_packages_of_the_runs(study_file, tmp_path):
    """They are those of the records, which several commits may have made."""
    study = load_study(study_file())
    results = Results(study, tmp_path)
    results.write_header(commit="new", versions={"torch": "2.12"}, verified=["pc/0 at new"])
    finish(results, {"none": 50.0, "pc": 70.0})
    for run, record in list(results.records().items()):
        old = run.stage == FINAL
        results.add(replace(record, commit="old" if old else "new", versions={"torch": "2.11" if old else "2.12"}))
    write_report(study, results)
    text = (results.folder / "report.md").read_text()
    assert "| code | old (4 runs); new (8 runs) |" in text and "| repeated bit for bit | pc/0 at new |" in text
    assert "| packages | torch 2.11 (4 runs); torch 2.12 (8 runs) |" in text
    assert "The learning rate of none, pc is at an end of the largest grid that was allowed." in text
