"""The pool that executes the runs of a study: errors, runs of other processes, a full disk, and what is left."""

import io
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("mmpretrain")

from rich.console import Console
from tiny_study import a_record

from condattn.openmmlab.study import schedule
from condattn.openmmlab.study.plan import RunId, load_study, planned_runs
from condattn.openmmlab.study.results import FAILED, Results
from condattn.openmmlab.study.schedule import BUSY, TRIES, Job, Pool


@pytest.fixture
def pool(study_file, tmp_path, monkeypatch):
    """A function that makes a pool whose command is Python code; its run is ``sys.argv[1]``."""
    monkeypatch.setattr(schedule, "POLL", 0.01)
    monkeypatch.setattr(schedule, "PAUSE", 0.01)

    def make(code: str, jobs: int = 2, **settings) -> Pool:
        study = load_study(study_file())
        made = Pool(study, Results(study, tmp_path), [sys.executable, "-c", code], jobs, **settings)
        made.console = Console(file=io.StringIO())
        return made

    return make


RUN = RunId("tuning", "pc", 5, 1e-3)


def test_errors_are_reported_after_a_second_try(pool, tmp_path):
    code = f"import sys; open({str(tmp_path / 'log')!r}, 'a').write('x'); sys.exit('error: no such thing')"
    assert pool(code, runs=[RUN]).work() == {RUN: "no such thing"}
    assert (tmp_path / "log").read_text() == "x" * TRIES


def test_a_run_of_another_process_is_waited_for(pool, tmp_path):
    """It is no error, even if that process is the one that ends with the result."""
    started, done = tmp_path / "started", tmp_path / "done"
    code = f"import sys; open({str(started)!r}, 'a').write('x'); sys.exit({BUSY})"
    waiting = pool(code, runs=[RUN])
    missing = waiting.missing

    def finish_elsewhere():
        if started.exists() and len(started.read_text()) > 2 and not done.exists():
            waiting.results.add(a_record(RUN, 50.0))
            done.touch()
        return missing()

    waiting.missing = finish_elsewhere
    assert waiting.work() == {}
    assert done.exists()


@pytest.mark.parametrize("error", ["[Errno 28] No space left on device", "[Errno 122] Disk quota exceeded"])
def test_no_run_is_started_on_a_full_disk(pool, error):
    full = pool(f"import sys; sys.exit('OSError: {error}')", jobs=1)
    assert list(full.work()) == planned_runs(full.study, {})[:1]


def test_a_run_that_another_pool_finishes_is_no_error(pool):
    made = pool("import sys; sys.exit('error: out of memory')")
    (first, *_), collect = planned_runs(made.study, {}), made._collect

    def finished_elsewhere():
        collect()
        if first in made.errors and first not in made.results.records():
            made.results.add(a_record(first, 50.0))

    made._collect = finished_elsewhere
    errors = made.work()
    assert first in made.errors and first not in errors and errors


def test_the_table_and_the_time_that_is_left(pool):
    """Final runs count before the tuning tells their rates; runs that were taken over say nothing about the time."""
    made = pool("")
    results, study = made.results, made.study
    assert made.to_go() == 8 + 4
    runs = planned_runs(study, {})
    results.add(a_record(runs[0], 50.0))
    results.add(a_record(runs[1], 0.0, status=FAILED, error="loss is not finite in iteration 1"))
    made.jobs = [Job(runs[2], None, 0.0, 0)]
    made.seconds = [120.0]
    assert made.to_go() == 10 and made._time_left() == "10 runs to go, about 0 h 9 min"
    console = Console(file=io.StringIO(), width=120)
    console.print(made.table())
    lines = [line.split("│") for line in console.file.getvalue().splitlines() if "│" in line]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines}
    failed, running = runs[1].variant, runs[2].variant
    assert rows["none"][:2] == ["1/4", "0/2"] and rows[failed][2] == "1"
    assert rows[running][3] == f"tuning {runs[2].seed} 0%"
    assert pool("", only=["pc"]).to_go() == 3 + 2

    for run in runs:
        results.add(a_record(run, 50.0))
    made.jobs = []
    assert made.to_go() == 4


@pytest.mark.parametrize("visible, used", [(None, ["0", "1", "0"]), ("4,GPU-7", ["4", "GPU-7", "4"])])
def test_each_run_has_a_gpu_of_its_own(visible, used, pool, monkeypatch):
    """Of all, or of those that a scheduler gave to the study."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = pool("import os, sys; sys.exit(os.environ['CUDA_VISIBLE_DEVICES'])", jobs=3)
    for _ in used:
        made._start(RUN)
    assert [job.process.communicate()[1].strip() for job in made.jobs] == used


def test_runs_that_were_taken_over_say_nothing_about_the_time(pool):
    made = pool("")
    for origin, seconds in (("another", 0), ("", 1)):
        made.results.add(replace(a_record(RUN, 50.0), origin=origin))
        made._start(RUN)
        made.jobs[0].process.wait()
        made._collect()
        assert len(made.seconds) == seconds and not made.errors
