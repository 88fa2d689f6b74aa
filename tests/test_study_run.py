"""Single runs of studies: what is read from their logs, taken over from other studies, resumed and begun anew."""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmpretrain")

from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner
from tiny_study import a_record, add_at_once

from condattn.openmmlab.errors import UserError
from condattn.openmmlab.hooks.empty_evaluation import EmptyEvaluationHook
from condattn.openmmlab.study import run as run_module
from condattn.openmmlab.study.plan import FINAL, RunId, load_study
from condattn.openmmlab.study.report import write_report
from condattn.openmmlab.study.results import FAILED, FINISHED, Results, versions
from condattn.openmmlab.study.run import BusyError, RunError, execute, read_curves, training_config

RUN = RunId("tuning", "pc", 5, 1e-3)
LEFT = ["20260101", "config.py", "iter_4.pth", "last_checkpoint"]
"""What an interrupted training has written."""


def test_evaluations_of_an_interrupted_run(tmp_path):
    """Values that were logged again after a resume replace earlier ones; an incomplete line is ignored."""
    lines = {
        "a": ['{"score": 1.0, "step": 2}', '{"spectra/x/entropy": 0.5, "spectra/y/entropy": 0.7, "step": 2}', '{"sco'],
        "b": ['{"loss": 1.0, "step": 3}', '{"score": 2.0, "step": 2}', '{"score": 3.0, "step": 4}'],
    }
    for name, content in lines.items():
        (tmp_path / name / "vis_data").mkdir(parents=True)
        (tmp_path / name / "vis_data" / "scalars.json").write_text("\n".join(content))
    assert read_curves(tmp_path, "score") == ([[2, 2.0], [4, 3.0]], {"entropy": [[2, 0.6]]})


def test_equal_trainings_of_two_studies_are_run_once(study_file, tmp_path, monkeypatch):
    """A run is taken over if configuration, metric, stage, commit and packages are equal; another one is executed."""
    first = load_study(study_file())
    second = replace(first, name="second", variants={"base": first.variants["none"], "pc": first.variants["pc"]})
    there, here = Results(first, tmp_path), Results(second, tmp_path)
    finals = [RunId(FINAL, variant, 1, 1e-3) for variant in ("none", "pc")]
    cfg = training_config(first, finals[0], tmp_path, tmp_path)
    training, early = run_module.training_hashes(first, cfg, tmp_path)
    assert training != early
    record = a_record(finals[0], 61.0, commit="abc", versions=versions(), training=training)
    there.add(replace(record, training=early))  # as before hashes of trainings did not depend on line breaks
    there.write_header(commit="abc", versions={}, data="0123456789abcdef")
    here.write_header(commit="abc", versions={}, data="0123456789abcdef" * 2)
    monkeypatch.setattr(run_module, "worktree", lambda root, commit: root)
    monkeypatch.setattr(run_module, "_call", lambda *arguments: "it was executed")
    base = replace(finals[0], variant="base")
    taken = run_module.execute(second, here, base, tmp_path, "abc")
    assert taken == here.records()[base] == replace(record, run=base, origin="tiny")
    write_report(second, here)
    assert (
        "1 of the runs were taken over from tiny, which had run the same trainings."
        in (here.folder / "report.md").read_text()
    )
    tuning = replace(base, stage="tuning")
    (here.folder / "runs.jsonl").unlink()
    for study, results, one, commit in (
        *((second, here, replace(base, seed=0), "abc"), (second, here, replace(base, rate=1e-4), "abc")),
        *((second, here, finals[1], "abc"), (second, here, base, "abd"), (second, here, tuning, "abc")),
        (replace(second, metric="accuracy/top5"), here, base, "abc"),
    ):
        with pytest.raises(run_module.RunError, match="it was executed"):
            run_module.execute(study, results, one, tmp_path, commit)
    there.add(replace(record, versions={**versions(), "torch": "1.0"}))
    with pytest.raises(run_module.RunError, match="it was executed"):
        run_module.execute(second, here, base, tmp_path, "abc")
    there.add(record)
    for data in (None, "1123456789abcdef" * 2):  # unknown, and other data
        here.write_header(data=data)
        with pytest.raises(run_module.RunError, match="it was executed"):
            run_module.execute(second, here, base, tmp_path, "abc")


def test_a_training_that_starts_from_weights_is_not_taken_over(study_file, tmp_path, monkeypatch):
    """Equal configurations name the same file, but it may hold other weights by now."""
    start = dict(checkpoint="{seed}.pth", command="the test writes it")
    first = replace(load_study(study_file()), start=start)
    monkeypatch.setattr(run_module, "worktree", lambda root, commit: root)
    monkeypatch.setattr(run_module, "_call", lambda *arguments: "the loss is not finite in iteration 1")
    records = []
    for number, study in enumerate((first, replace(first, name="second"))):
        torch.save({"weight": torch.full((2,), number)}, tmp_path / "5.pth")
        Results(study, tmp_path).write_header(commit="abc", versions={}, data="0123456789abcdef" * 2)
        records.append(execute(study, Results(study, tmp_path), RUN, tmp_path, "abc"))
    one, other = records
    assert one.training == other.training and one.start != other.start and other.origin == ""


def test_processes_that_add_records_at_once_lose_none(study_file, tmp_path):
    results = Results(load_study(study_file()), tmp_path)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    runs = [[replace(RUN, seed=seed) for seed in range(first, 40, 2)] for first in (0, 1)]
    processes = [context.Process(target=add_at_once, args=(results, some, barrier)) for some in runs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert results.scores() == {replace(RUN, seed=seed): float(seed) for seed in range(40)}


@pytest.fixture
def training(study_file, tmp_path, monkeypatch):
    """A function that executes ``RUN``, for which a training is pretended that logs given lines and ends as given."""
    study = load_study(study_file())
    results = Results(study, tmp_path)
    monkeypatch.setattr(run_module, "worktree", lambda root, commit: root)
    folder = results.work / "runs" / "tuning_pc_5_0.001"
    found = []

    def run(lines, error="", commit="abc"):
        def call(code, root, lock, log, tool, config, option, work, *arguments):
            assert option == "--work-dir"
            found[:] = sorted(path.name for path in work.iterdir()) if work.exists() else []
            logs = work / "20260101" / "vis_data"
            logs.mkdir(parents=True, exist_ok=True)
            (logs / "scalars.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (work / config.name).write_text("as mmengine writes it")
            (work / "iter_4.pth").touch()
            (work / "last_checkpoint").touch()
            return error

        monkeypatch.setattr(run_module, "_call", call)
        return execute(study, results, RUN, tmp_path, commit)

    run.folder, run.found, run.results = folder, found, results
    return run


def test_a_record_names_the_checkpoint_that_it_started_from(study_file, tmp_path, monkeypatch):
    start = dict(checkpoint="{seed}.pth", command="the test writes it")
    study = replace(load_study(study_file()), start=start)
    results = Results(study, tmp_path)
    monkeypatch.setattr(run_module, "worktree", lambda root, commit: root)
    monkeypatch.setattr(run_module, "_call", lambda *arguments: "the loss is not finite in iteration 1")
    weights = {"b": torch.tensor(0.5, dtype=torch.bfloat16), "a": torch.arange(6).view(2, 3)}
    torch.save({"state_dict": weights, "meta": "today"}, tmp_path / "5.pth")
    record = execute(study, results, RUN, tmp_path, "abc")
    content = b"a torch.int64 [2, 3]" + np.arange(6, dtype="<i8").tobytes() + b"b torch.bfloat16 []" + b"\x00\x3f"
    assert record.start == hashlib.sha256(content).hexdigest()[:16] and results.records() == {RUN: record}
    results.write_header(commit="abc", versions={})
    write_report(study, results)
    report = (results.folder / "report.md").read_text()
    assert f"| trainings start from | {{seed}}.pth; seed 5: {record.start} |" in report
    torch.save({"state_dict": weights | {"a": torch.ones(2, 3)}}, tmp_path / "5.pth")
    other = replace(RUN, variant="none")
    with pytest.raises(UserError, match=rf"tuning/pc/5/0.001 started from other weights \({record.start}\) than"):
        execute(study, results, other, tmp_path, "abc")
    torch.save({"state_dict": dict(reversed(weights.items())), "meta": "tomorrow"}, tmp_path / "5.pth")  # made again
    execute(study, results, other, tmp_path, "abc")
    torch.save(weights, tmp_path / "6.pth")  # that of another seed
    execute(study, results, replace(other, seed=6), tmp_path, "abc")
    assert len(results.records()) == 3
    later = replace(other, seed=6, rate=1e-4)
    torch.save({"state_dict": {}}, tmp_path / "6.pth")
    with pytest.raises(UserError, match="6.pth holds no weights to start from"):
        execute(study, results, later, tmp_path, "abc")
    (tmp_path / "6.pth").write_bytes(b"abc")
    with pytest.raises(UserError, match="6.pth .* is no file of weights"):
        execute(study, results, later, tmp_path, "abc")


def scores(*values):
    return [{"accuracy/top1": value, "step": 2 * step + 2} for step, value in enumerate(values)]


def test_what_a_finished_run_leaves(training):
    """Its logs alone, so that it begins anew if its record is lost."""
    record = training(scores(40.0, 50.0))
    assert (record.status, record.score, record.curve) == (FINISHED, 50.0, [[2, 40.0], [4, 50.0]])
    assert training.results.records() == {RUN: record}
    assert sorted(path.name for path in training.folder.iterdir()) == ["config.py", "lock"]


def test_an_interrupted_run_is_resumed_with_its_own_code_and_settings_alone(training):
    for commit, files in (("abc", []), ("abc", LEFT), ("abd", [])):
        with pytest.raises(RunError, match="out of memory; the log is .*train.log"):
            training(scores(40.0), "out of memory", commit)
        assert training.found == files


def test_an_interrupted_run_is_not_resumed_with_other_packages(training, monkeypatch):
    for torch_version, files in (("2.11.0", []), ("2.11.0", LEFT), ("2.12.0", [])):
        monkeypatch.setattr(run_module, "versions", lambda version=torch_version: {"torch": version})
        with pytest.raises(RunError, match="out of memory"):
            training(scores(40.0), "out of memory")
        assert training.found == files
    versions_then = iter([{"torch": "2.12.0"}, {"torch": "2.13.0"}])
    monkeypatch.setattr(run_module, "versions", lambda: next(versions_then))
    assert training(scores(40.0, 50.0)).versions == {"torch": "2.12.0"}  # those with which it began


def test_runs_that_are_under_way(training, tmp_path):
    assert run_module.under_way(training.results) == []
    training(scores(40.0, 50.0))
    assert run_module.under_way(training.results) == []
    with run_module._alone(training.folder, RUN):
        assert run_module.under_way(training.results) == [training.folder.name]


def test_a_run_that_lost_an_evaluation_begins_anew(training):
    with pytest.raises(RunError, match="no accuracy/top1 of iteration 2; it begins anew"):
        training(scores(40.0, 50.0)[1:])
    training(scores(40.0, 50.0))
    assert training.found == []


def test_later_runs_are_configured_as_the_earlier_ones(training, tmp_path, monkeypatch):
    """The commit of a study does not fix the code that applies its settings."""
    training(scores(40.0, 50.0))
    results, configure = training.results, run_module.training_config

    def check(variant="pc", commit="abc"):
        run_module.check_trainings(results.study, results, variant, tmp_path, tmp_path, commit)

    results.add(replace(results.records()[RUN], run=replace(RUN, variant="none"), training=""))  # the first in the file
    check()

    def other(*arguments):
        cfg = configure(*arguments)
        cfg.train_dataloader.batch_size = 3
        return cfg

    monkeypatch.setattr(run_module, "training_config", other)
    with pytest.raises(UserError, match="tiny: tuning/pc/5/0.001 is configured otherwise now than when it ran"):
        check()
    check("none")
    check(commit="abd")  # no run of this code yet


def test_the_hash_of_a_training_is_the_same_wherever_the_data_are(study_file, tmp_path, monkeypatch):
    study = load_study(study_file())
    hashes = set()
    for folder in ("/some/data", "/other/data", "/a/path/which/is/so/long/that/it/does/not/fit/into/a/line" * 2):
        monkeypatch.setenv("FASHION_MNIST", folder)
        cfg = training_config(study, RUN, tmp_path, tmp_path)
        assert folder in cfg.pretty_text
        hashes.add(run_module.training_hashes(study, cfg, tmp_path)[0])
    other = run_module.training_hashes(replace(study, metric="accuracy/top5"), cfg, tmp_path)[0]
    assert len(hashes) == 1 and hashes != {other}


def test_options_keep_their_types(study_file, tmp_path):
    """Transforms of mmcv expect tuples as scales, and no lists."""
    hooks = [dict(type="SpectraHook", quantities=("weights",))]
    study = replace(load_study(study_file()), options={"custom_hooks": hooks, "train_cfg.max_iters": 4})
    cfg = training_config(study, RUN, tmp_path, tmp_path)
    assert cfg.custom_hooks[0].quantities == ("weights",)


def test_spectra_and_checkpoints_are_written_at_each_evaluation(study_file, tmp_path):
    hooks = [dict(type="SpectraHook", interval=3), dict(type="SomeHook", interval=3)]
    study = replace(load_study(study_file()), options={"custom_hooks": hooks, "train_cfg.max_iters": 4})
    cfg = training_config(study, RUN, tmp_path, tmp_path)
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 2
    assert [hook.interval for hook in cfg.custom_hooks] == [2, 3]


def test_a_metric_that_the_evaluations_do_not_have(training):
    """The training is kept, because running it again would not help."""
    lines = [{"loss": 1.0, "lr": 0.1, "step": 1}, {"spectra/x/entropy": 0.5, "step": 2}]
    lines += [{"accuracy/top5": 40.0, "time": 0.1, "step": step} for step in (2, 4)]
    for files in ([], LEFT):
        with pytest.raises(RunError, match="no accuracy/top1 in the evaluations, which report accuracy/top5$"):
            training(lines)
        assert training.found == files


def test_a_full_disk_leaves_the_run_as_it_was(training, monkeypatch):
    with pytest.raises(RunError, match="out of memory"):
        training(scores(40.0), "out of memory")

    def no_space(path, write, overwrite):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(run_module, "write_atomically", no_space)
    assert training(scores(40.0, 50.0)).score == 50.0  # nothing has to be written
    assert "iter_4.pth" in training.found


def test_a_run_of_another_process(training):
    training.folder.mkdir(parents=True)
    with run_module._alone(training.folder, RUN), pytest.raises(BusyError, match="is being run by another process"):
        training(scores(40.0, 50.0))


def test_what_counts_as_diverged(training):
    """A loss that is not finite, and no error of the data."""
    with pytest.raises(RunError, match="its bbox is not finite"):
        training([], "image 3: its bbox is not finite, or is beyond every image")
    record = training(scores(40.0), "loss is not finite in iteration 3; lower the learning rate")
    assert (record.status, record.score, record.reported) == (FAILED, 40.0, {})


def test_an_evaluation_without_predictions_scores_0(training, tmp_path, monkeypatch):
    """mmdet's evaluator then reports nothing."""
    empty = {"data_time": 0.1, "time": 0.2, "step": 4}
    assert training([*scores(40.0), empty]).curve == [[2, 40.0], [4, 0.0]]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "last_checkpoint").write_text("iter_4.pth")

    def test(code, root, lock, log, tool, config, checkpoint, option, work):
        (work / "20260101").mkdir(parents=True)
        (work / "20260101" / "20260101.json").write_text('{"data_time": 0.1, "time": 0.2}')
        return ""

    monkeypatch.setattr(run_module, "_call", test)
    arguments = (tmp_path, tmp_path, None, tmp_path, "coco/segm_mAP")
    assert run_module._evaluate(*arguments) == {"coco/segm_mAP": 0.0}


class Sum(BaseModel):
    """A model of one layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, *rows, mode):
        y = self.layer(torch.stack(rows))
        return {"loss": y.square().mean()} if mode == "loss" else [y.sum()]


class Sometimes(BaseMetric):
    """Reports nothing in the second evaluation."""

    values = iter([{"error": 1.0}, {}, {"error": 3.0}])

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return next(self.values)


@pytest.mark.parametrize("hooks", [[], [EmptyEvaluationHook()]], ids=["mmengine alone", "with the hook"])
def test_scores_of_an_earlier_evaluation_are_not_logged_again(hooks, tmp_path):
    data = torch.linspace(-1, 1, 8).view(4, 2)
    loader = dict(batch_size=2, sampler=dict(type="DefaultSampler", shuffle=False), dataset=data)
    Sometimes.values = iter([{"error": 1.0}, {}, {"error": 3.0}])
    Runner(
        model=Sum(),
        work_dir=str(tmp_path),
        train_dataloader=dict(loader, sampler=dict(type="InfiniteSampler", shuffle=False)),
        train_cfg=dict(by_epoch=False, max_iters=6, val_interval=2),
        val_dataloader=loader,
        val_cfg={},
        val_evaluator=Evaluator(Sometimes()),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        default_hooks=dict(logger=dict(type="LoggerHook", log_metric_by_epoch=False)),
        custom_hooks=hooks,
        experiment_name=f"empty evaluation {len(hooks)}",
    ).train()
    found = read_curves(tmp_path, "error")[0]
    assert found == [[2, 1.0], [4, 0.0 if hooks else 1.0], [6, 3.0]]


def test_scores_of_the_checkpoint_of_a_resumed_run_are_not_logged_again():
    """The message hub of a resumed run has the scores that were logged before, and the hook has seen none."""
    hub = MessageHub("resumed")
    for name in ("val/error", "val/time", "train/loss"):
        hub.update_scalar(name, 1.0)
    runner = SimpleNamespace(message_hub=hub, logger=logging.getLogger("resumed"), iter=4)
    EmptyEvaluationHook().after_val_epoch(runner, {})
    assert hub.log_scalars.keys() == {"val/time", "train/loss"}


@pytest.fixture
def tool(tmp_path):
    """A function that calls a tool with the given code."""
    (tmp_path / "tools").mkdir()

    def call(code):
        (tmp_path / "tools" / "tool.py").write_text(code)
        with run_module._alone(tmp_path, RUN) as lock:
            return run_module._call(tmp_path, tmp_path, lock, tmp_path / "log", "tool.py")

    return call


def test_the_error_message_is_that_of_the_last_call(tool):
    assert tool("print('error: no memory'); exit(1)") == "no memory"
    assert tool("import os; os.kill(os.getpid(), 9)") == "tool.py ended with status -9"
    assert tool("print('a note'); exit(1)") == "a note"
    assert tool("") == ""


def test_a_tool_imports_the_code_of_the_commit_and_computes_with_one_thread(tool, tmp_path, monkeypatch):
    """Whatever the environment of the user says; what is in the user's PYTHONPATH alone can be imported as well."""
    for folder, modules in (("projects", ["common"]), ("users", ["common", "own"])):
        (tmp_path / folder).mkdir()
        for module in modules:
            (tmp_path / folder / f"{module}.py").write_text(f"place = {folder!r}")
    threads = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    for name in threads:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "users"))
    code = f"import common, os, own; print(common.place, own.place, *map(os.getenv, {threads})); exit(1)"
    assert tool(code) == "projects users 1 1 1"
    for paths in ("", None):  # no empty path, which would be the current folder
        monkeypatch.delenv("PYTHONPATH") if paths is None else monkeypatch.setenv("PYTHONPATH", paths)
        assert tool("import os; print(os.environ['PYTHONPATH']); exit(1)") == str(tmp_path / "projects")


def test_a_tool_that_survives_its_parent_keeps_the_lock(tmp_path):
    """So that no second training runs in the same folder."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "tool.py").write_text(
        "import os, time; print(os.getpid(), file=open('pid', 'w')); time.sleep(60)"
    )
    code = """
from pathlib import Path
from condattn.openmmlab.study import run
from condattn.openmmlab.study.plan import RunId
with run._alone(Path("."), RunId("tuning", "pc", 5, 1e-3)) as lock:
    run._call(Path("."), Path("."), lock, Path("log"), "tool.py")
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    with pytest.raises(RunError, match="is being run by another process"), run_module._alone(tmp_path, RUN):
        pass
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    while True:
        try:
            with run_module._alone(tmp_path, RUN):
                return
        except RunError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_final_evaluation_that_fails(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "last_checkpoint").write_text("iter_4.pth")
    arguments = (tmp_path, tmp_path, None, tmp_path, "coco/segm_mAP")
    monkeypatch.setattr(run_module, "_call", lambda *_: "out of memory")
    with pytest.raises(run_module.RunError, match="out of memory; the log is .*test.log"):
        run_module._evaluate(*arguments)

    def other(code, root, lock, log, tool, config, checkpoint, option, work):
        (work / "1").mkdir(parents=True)
        (work / "1" / "1.json").write_text('{"coco/bbox_mAP": 0.5}')
        return ""

    monkeypatch.setattr(run_module, "_call", other)
    with pytest.raises(run_module.RunError, match="no coco/segm_mAP in what .*test.log reports"):
        run_module._evaluate(*arguments)
