"""The command of studies: its first and later starts, single runs and repetitions, in a repository of its own."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest
from runs import ROOT, error_lines

pytest.importorskip("mmpretrain")

from tiny_study import TINY, a_record, write_images

from condattn.openmmlab.study import run as run_module
from condattn.openmmlab.study.plan import FINAL, PILOT, TUNING, RunId, load_study
from condattn.openmmlab.study.results import FAILED, Results, versions

RUN = RunId(TUNING, "none", 5, 1e-4)
LAST = RunId(FINAL, "none", 0, 1e-3)


@pytest.fixture
def study(call, tmp_path, monkeypatch):
    """A function that calls the tool in a repository with a tiny study; every run is pretended, with the score 50."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "configs" / "studies" / "_base_", root / "configs" / "studies" / "_base_")
    path = root / "configs" / "studies" / "tiny.py"
    path.write_text(TINY)
    (root / ".gitignore").write_text("work_dirs/\nresults/\n")
    write_images(tmp_path / "data")
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "data"))
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    scores = []

    def commit(text: str) -> str:
        (root / "configs" / "note.txt").write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", "code"], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    def execute(study, results, run, root, commit, keep=True):
        record = a_record(run, scores[0], commit=commit)
        if keep:
            results.add(record)
        return record

    def study(*arguments: str, status: int = 0, **replaced) -> str:
        found, output, errors = call("study", path, *arguments, ROOT=root, execute=execute, **replaced)
        assert found == status, errors
        return error_lines(errors)[0] if status else output

    study.root, study.path, study.commit, study.scores = root, path, commit, scores
    study.results = Results(load_study(str(path)), root)
    study.first = commit("first")
    scores[:] = [50.0]
    return study


def header(study) -> dict:
    return json.loads((study.results.folder / "study.json").read_text())


def change_header(study, **values) -> None:
    (study.results.folder / "study.json").write_text(json.dumps(header(study) | values))


def test_a_study_begins_with_committed_code(study):
    (study.root / "configs" / "note.txt").write_text("changed")
    assert "commit what is not: M configs/note.txt" in study("--list", status=2)
    assert not study.results.started
    second = study.commit("second")
    assert study("--list").count("--run tuning/") == 8
    assert header(study)["commit"] == second and len(header(study)["data"]) == 32


def test_the_list_of_runs_has_nothing_but_commands(study):
    def noisy(*arguments):
        print("loading annotations into memory...")
        return "0123456789abcdef"

    listed = study("--list", check_study=noisy).splitlines()
    assert len(listed) == 8 and all("study.py" in line and "--run tuning/" in line for line in listed)
    assert study("--list", data_hash=noisy, check_checkpoints=noisy).splitlines() == listed


def test_before_the_first_run_another_commit_may_be_chosen(study):
    second = study.commit("second")
    study("--list", "--commit", study.first)
    assert header(study)["commit"] == study.first
    study("--list", "--commit", second)
    assert header(study)["commit"] == second
    study("--run", str(RUN))
    error = study("--list", "--commit", study.first, status=2)
    assert f"tiny began with {second[:12]}, not {study.first[:12]}" in error


def test_the_commit_is_not_changed_under_runs_or_another_study(study):
    second = study.commit("second")
    study("--list", "--commit", study.first)
    folder = study.results.work / "runs" / "tuning_none_5_0.0001"
    folder.mkdir(parents=True)
    with run_module._alone(folder, RUN):
        error = study("--list", "--commit", second, status=2)
    assert "runs of tiny are under way (tuning_none_5_0.0001); end them first" in error
    study.path.write_text(TINY.replace("difference = 5.0", "difference = 4.0"))
    third = study.commit("third")
    assert "was written by another study" in study("--list", "--commit", third, status=2)
    assert header(study)["commit"] == study.first
    for option in (("--report-only",), ("--run", str(RUN)), ("--rerun", "none/0")):
        assert "--commit chooses the code at the start" in study("--commit", third, *option, status=2)


def test_a_commit_without_the_configuration(study):
    study.path.write_text(TINY.replace("vit_fashion_mnist.py", "later.py"))
    shutil.copy(study.path.parent / "_base_" / "vit_fashion_mnist.py", study.path.parent / "_base_" / "later.py")
    study.commit("second")
    assert "no configuration" in study("--list", "--commit", study.first, status=2)
    assert not (study.root / "results").exists()


def test_a_study_that_runs_needs_nothing_of_the_present_configuration(study):
    """Its code is that of the commit."""
    study("--run", str(RUN), status=2)  # it has not begun
    study("--list")
    (study.path.parent / "_base_" / "vit_fashion_mnist.py").unlink()
    study.commit("second")
    assert study("--list").count("--run tuning/") == 8
    study("--run", str(RUN))
    assert study.results.scores() == {RUN: 50.0}
    assert "report.md" in study("--report-only")


def test_data_of_a_study(study, tmp_path, monkeypatch):
    """They may be moved, but not changed."""
    study("--list")
    (tmp_path / "data").rename(tmp_path / "moved")
    assert "no data for training" in study("--run", str(RUN), status=2)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "moved"))
    study("--run", str(RUN))
    recorded = header(study)["data"]
    change_header(study, data=recorded[:16])  # as of early studies, of names and sizes alone
    study("--list")
    change_header(study, data=recorded)
    write_images(tmp_path / "moved", seed=1)
    assert "began with other data than those in" in study("--list", status=2)
    write_images(tmp_path / "moved", number=70)
    for arguments in (("--list",), ("--run", str(replace(RUN, seed=6)))):
        assert "began with other data than those in" in study(*arguments, status=2)
    assert study.results.scores() == {RUN: 50.0}
    study("--run", str(replace(RUN, seed=6)), "--data-checked")  # as a study starts its own runs, after its check
    assert len(study.results.scores()) == 2


def test_packages_of_a_study(study, monkeypatch):
    study("--list")
    change_header(study, versions={**versions(), "torch": "1.0"})
    for arguments in (("--list",), ("--run", str(RUN))):
        assert "began with other packages, or on another kind of machine (torch)" in study(*arguments, status=2)
    known = {name: version for name, version in versions().items() if name != "scipy"}
    change_header(study, versions=known)  # as a header that is older than the list of packages
    study("--run", str(RUN))
    change_header(study, versions={name: version for name, version in known.items() if name != "gpu"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "some GPU")
    for arguments in (("--list",), ("--run", str(replace(RUN, seed=6)))):  # began without a GPU
        assert "began with other packages, or on another kind of machine (gpu)" in study(*arguments, status=2)


def test_single_runs(study):
    study("--list")
    assert "expected STAGE/VARIANT/SEED/RATE, got tuning/none" in study("--run", "tuning/none", status=2)
    assert "is no run that tiny needs now" in study("--run", str(LAST), status=2)
    study("--run", str(RUN))
    study.scores[:] = [60.0]
    study("--run", str(RUN))  # is not run again
    assert study.results.scores() == {RUN: 50.0}


def test_a_single_pilot_run_is_recorded_with_the_pilot_alone(study):
    pilot, run = Results(study.results.study, study.root, pilot=True), RunId(PILOT, "none", 7, 1e-3)
    study("--list")
    assert "no results of this study" in study("--run", str(run), status=2)  # the pilot has not begun
    pilot.write_header(**header(study))
    study("--run", str(run))
    assert pilot.scores() == {run: 50.0} and study.results.scores() == {}
    study("--run", str(RUN))
    assert pilot.scores() == {run: 50.0} and study.results.scores() == {RUN: 50.0}


def test_a_repeated_run(study):
    """Its code replaces that of the study only if the result is the same."""
    assert "no results of this study" in study("--rerun", "none/0", status=2)
    study("--list")
    assert "expected a finished run such as none yet, got none/0" in study("--rerun", "none/0", status=2)
    study.results.add(a_record(LAST, 50.0, status=FAILED, commit=study.first))
    assert "expected a finished run such as none yet, got none/0" in study("--rerun", "none/0", status=2)
    study.results.add(a_record(LAST, 50.0, commit=study.first))
    change_header(study, versions={**versions(), "torch": "1.0"})
    second = study.commit("second")
    (study.root / "configs" / "note.txt").write_text("changed")
    assert "commit what is not" in study("--rerun", "none/0", status=2)
    study.commit("third")
    study.scores[:] = [50.1]
    assert "none/0 gives 50.1" in study("--rerun", "none/0", status=2)
    assert header(study)["commit"] == study.first
    study.scores[:] = [50.0]
    assert "is the same bit for bit" in study("--rerun", "none/0")
    assert header(study)["commit"] not in (study.first, second) and header(study)["versions"] == versions()


def test_the_pilot_of_a_changed_study_replaces_the_former(study):
    """Once nothing is wrong with the new one."""
    pilot = Results(study.results.study, study.root, pilot=True)
    pilot.write_header(commit=study.first, versions=versions())
    pilot.add(a_record(RunId("pilot", "none", 7, 1e-3), 50.0))
    study.path.write_text(TINY.replace("difference = 5.0", "difference = 4.0"))
    assert "commit what is not" in study("--pilot", "--data", study.root.parent / "data", status=2)
    assert len(pilot.records()) == 1
    changed = study.commit("changed")

    class Pool:
        def __init__(self, *arguments):
            pass

        def work(self):
            return {}

    study("--pilot", Pool=Pool)
    new = Results(load_study(str(study.path)), study.root, pilot=True)
    assert new.header()["commit"] == changed and not new.records()


def test_options_that_have_no_effect_together(study):
    for arguments in (("--report-only",), ("--pilot",), ("--run", str(RUN)), ("--rerun", "none/0")):
        assert "--only chooses among the runs of a study, not with" in study("--only", "pc", *arguments, status=2)
    assert "--data-checked goes with --run" in study("--list", "--data-checked", status=2)


def test_a_broken_study_does_not_spoil_the_report_of_another(study):
    study("--list")
    (study.path.parent / "broken.py").write_text("1 / 0")
    (study.root / "docs").mkdir()
    (study.root / "docs" / "results.md").write_text("<!-- begin tiny -->\n<!-- end tiny -->\n")
    assert "docs/results.md" in study("--report-only")
    assert "Incomplete: 0 of 12" in (study.root / "docs" / "results.md").read_text()


def test_runs_that_were_not_finished(study):
    seen = []

    class Pool:
        def __init__(self, *arguments):
            seen.append(arguments)

        def work(self):
            return {RUN: "no such thing"}

    error = study("--only", "none", "--jobs", "2", status=1, Pool=Pool)
    assert error == f"error: {RUN} is not finished: no such thing"
    _, _, command, jobs, only, runs = seen[0]
    assert (jobs, only, runs) == (2, ["none"], None) and command[-2:] == ["--data-checked", "--run"]
    assert (study.results.folder / "report.md").exists()


def test_some_variants_alone(study):
    listed = study("--list", "--only", "pc")
    assert listed.count("--run tuning/pc/") == 4 and "tuning/none" not in listed


def test_a_copy_of_the_code_that_was_changed(study):
    study("--list")
    copy = study.root / "work_dirs" / "studies" / "code" / study.first
    (copy / "configs" / "note.txt").write_text("changed")
    assert "is changed (M configs/note.txt); remove it" in study("--list", status=2)
    (copy / "configs" / "note.txt").write_text("first")
    study("--list")
    (copy / "projects").mkdir()
    (copy / "projects" / "torch.py").touch()  # would be imported in place of the package
    assert "is changed (?? projects/); remove it" in study("--list", status=2)
