"""Resumed runs end with the same weights as uninterrupted ones, and start from checkpoints that can be read."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from runs import DEMO, TOOLS, error_lines, first_iteration, forwarded, run

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config

from condattn.openmmlab.errors import UserError
from condattn.openmmlab.hooks.exact_resume import ExactResumeHook
from condattn.openmmlab.runner import checkpoints
from condattn.openmmlab.runner import work_dir as work_dir_module
from condattn.openmmlab.runner.checkpoints import check_same_start, find_resumable
from condattn.openmmlab.runner.work_dir import reserved

EMA = "custom_hooks = [dict(type='EMAHook', momentum=0.1)]\nrandomness = dict(seed=3)\n"
# The demo detector has random augmentation and sampling; these settings add randomness to the segmenter's workers and
# model.
RANDOM = """
model = dict(backbone=dict(drop_path_rate=0.3), decode_head=dict(dropout_ratio=0.3))
steps = [dict(type=name) for name in ('LoadImageFromFile', 'LoadAnnotations', 'RandomFlip', 'PackSegInputs')]
steps[2].update(prob=0.5)
steps.insert(2, dict(type='Resize', scale=(96, 96), keep_ratio=True))
train_dataloader = dict(dataset=dict(pipeline=steps))
"""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Start runs on the CPU, where the same operations give the same bits."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def training(kind, small, scenes, folder, workers, keep=-1):
    """The command of a short demo training with EMA, and the name of its last checkpoint."""
    name = {"epoch": "mask_rcnn_swin_pc", "iter": "upernet_swin_pc"}[kind]
    text = f"_base_ = {str(DEMO / f'{name}.py')!r}\n{EMA}"
    (folder / f"{kind}.py").write_text(text + (RANDOM if kind == "iter" else ""))
    options = [*small, f"train_dataloader.num_workers={workers}", f"train_dataloader.persistent_workers={workers > 0}"]
    options.append(f"default_hooks.checkpoint.max_keep_ckpts={keep}")
    if kind == "epoch":
        ann_file = scenes / "annotations" / "instances_validation.json"
        options += [f"{one}_evaluator.ann_file={ann_file}" for one in ("val", "test")]
        options += ["train_cfg.max_epochs=4", "train_cfg.val_interval=2"]
    else:
        options += ["train_cfg.max_iters=9", "train_cfg.val_interval=3", "default_hooks.checkpoint.interval=2"]
    return [TOOLS / "train.py", folder / f"{kind}.py", "--cfg-options", *options]


def weights(path):
    checkpoint = torch.load(path, weights_only=False)
    return {**checkpoint["state_dict"], **{f"ema {name}": v for name, v in checkpoint["ema_state_dict"].items()}}


def check_kills(kind, small, scenes, folder, kills, workers):
    command = training(kind, small, scenes, folder, workers, keep=1)
    began = time.monotonic()
    run(*command, "--work-dir", folder / "whole", cwd=folder)
    duration = time.monotonic() - began
    moments = random.Random(7)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = 0
    resume = [sys.executable, *map(str, command), "--work-dir", str(folder / "killed"), "--resume"]
    while killed < kills:
        process = subprocess.Popen(
            resume,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=moments.uniform(0.1, 1.0) * duration)
            assert process.returncode == 0, output.decode()[-3000:]
            (folder / "killed" / "last_checkpoint").unlink()  # the run had finished before the kill: start again
            for path in (folder / "killed").glob("*.pth"):
                path.unlink()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
    run(*command, "--work-dir", folder / "killed", "--resume", cwd=folder)
    last = Path((folder / "whole" / "last_checkpoint").read_text()).name
    whole, resumed = weights(folder / "whole" / last), weights(folder / "killed" / last)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert not list((folder / "killed").glob(".*.part"))


@pytest.mark.parametrize(
    "kind, workers",
    [
        pytest.param("epoch", 2, marks=pytest.mark.slow),
        pytest.param("epoch", 0, marks=pytest.mark.slow),
        pytest.param("iter", 2, marks=forwarded),
        pytest.param("iter", 0, marks=[forwarded, pytest.mark.slow]),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(kind, workers, small, scenes, tmp_path):
    """The run is stopped after a checkpoint in the middle, as by a kill, and resumed."""
    command = training(kind, small, scenes, tmp_path, workers)
    run(*command, "--work-dir", tmp_path / "whole", cwd=tmp_path)
    last = Path((tmp_path / "whole" / "last_checkpoint").read_text()).name
    whole = weights(tmp_path / "whole" / last)
    # After a validation with a better model, and before one.
    for name in {"epoch": ["epoch_2.pth", "epoch_1.pth"], "iter": ["iter_3.pth", "iter_2.pth"]}[kind]:
        stopped, work_dir = tmp_path / "whole" / name, tmp_path / name
        run(*command, "--work-dir", work_dir, "--resume", stopped, cwd=tmp_path)
        assert first_iteration(work_dir) > 1
        resumed = weights(work_dir / last)
        assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
        assert any(not torch.equal(whole[key], value) for key, value in weights(stopped).items())


def validated(folder):
    """Position -> metrics of the validations that the runs in a work directory have logged."""
    lines = [json.loads(line) for path in folder.glob("*/vis_data/scalars.json") for line in path.open()]
    return {line["step"]: {key: line[key] for key in ("mIoU", "mAcc")} for line in lines if "mIoU" in line}


@forwarded
def test_a_validation_that_was_cut_off_is_made_up_for(small, scenes, tmp_path):
    """Its checkpoint is there, as after a kill in the validation: iteration 6 saves before it, 9 is the last."""
    command = [*training("iter", small, scenes, tmp_path, 0), "default_hooks.checkpoint.save_best=None"]
    whole = run(*command, "--work-dir", tmp_path / "whole", cwd=tmp_path)
    results = validated(tmp_path / "whole")
    assert set(results) == {3, 6, 9} and "follows now" not in whole.stdout + whole.stderr
    for position, expected in ((6, {6, 9}), (9, {9}), (8, {9})):
        work_dir = tmp_path / f"from {position}"
        stopped = tmp_path / "whole" / f"iter_{position}.pth"
        resumed = run(*command, "--work-dir", work_dir, "--resume", stopped, cwd=tmp_path)
        assert validated(work_dir) == {one: results[one] for one in expected}
        message = f"saved before the validation of iteration {position}, which follows now"
        assert (message in resumed.stdout + resumed.stderr) == (position != 8)


@forwarded
def test_a_validation_that_is_in_the_checkpoint_is_not_repeated(small, scenes, tmp_path):
    """The checkpoint was saved again after it, because the model was the best."""
    command = training("iter", small, scenes, tmp_path, 0)
    run(*command, "--work-dir", tmp_path / "whole", cwd=tmp_path)
    run(*command, "--work-dir", tmp_path / "resumed", "--resume", tmp_path / "whole" / "iter_3.pth", cwd=tmp_path)
    assert set(validated(tmp_path / "resumed")) == {6, 9}


@pytest.mark.slow
@pytest.mark.parametrize("kind, workers", [("epoch", 0), pytest.param("iter", 2, marks=forwarded)])
def test_ten_kills(kind, workers, small, scenes, tmp_path):
    check_kills(kind, small, scenes, tmp_path, kills=10, workers=workers)


def test_the_newest_checkpoint_that_can_be_read(detection, tmp_path, capsys):
    whole = detection.checkpoint.read_bytes()
    for name, content in (("epoch_1.pth", whole), ("epoch_2.pth", whole), ("epoch_10.pth", whole[:-5000])):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_10.pth"))
    assert find_resumable(tmp_path) == str(tmp_path / "epoch_2.pth")
    (line,) = capsys.readouterr().err.splitlines()
    assert "epoch_10.pth" in line and "the checkpoint before it is tried" in line
    (tmp_path / "last_checkpoint").write_text("")
    assert find_resumable(tmp_path) == str(tmp_path / "epoch_2.pth")
    for name in ("epoch_1.pth", "epoch_2.pth"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* can be resumed from"):
        find_resumable(tmp_path)
    assert find_resumable(tmp_path / "nowhere") is None
    (tmp_path / "last_checkpoint").write_text("s3://bucket/run/epoch_11.pth")
    with pytest.raises(UserError, match="^s3://bucket/run/epoch_11.pth, the last checkpoint, .* --resume FILE$"):
        find_resumable(tmp_path)


def test_processes_that_find_different_checkpoints(monkeypatch):
    cfg = Config(dict(resume=True, load_from="run/epoch_3.pth"))
    check_same_start(cfg)
    monkeypatch.setattr(checkpoints, "all_gather_object", lambda own: [own, "none", own])
    with pytest.raises(
        UserError, match="different checkpoints to resume from .epoch_3.pth by process 0, none by process 1"
    ):
        check_same_start(cfg)


def test_a_training_over_an_earlier_one_warns(call, detection, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "epoch_1.pth").write_bytes(b"")
    options = [*detection.options, "model.neck.out_chanels=3"]
    _, _, errors = call("train", detection.config, "--work-dir", "run", "--cfg-options", *options)
    assert "run has checkpoints of an earlier training (epoch_1.pth), which this one overwrites" in errors


def test_a_training_that_resumes_in_another_folder_or_from_nothing_warns(call, detection, tmp_path):
    """A training that resumes in its own folder does not."""
    overwrites, nothing = "checkpoints of an earlier training (epoch_1.pth)", "run has no checkpoint to resume from"
    folder = tmp_path / "run"
    folder.mkdir()
    wrong = "model.neck.out_chanels=3"  # so that nothing is trained
    own = f"resume=True load_from={folder / 'epoch_1.pth'}".split()
    for name, arguments, options, expected in (
        ("best_1.pth", ["--resume"], [], {nothing}),
        ("epoch_1.pth", ["--resume", detection.checkpoint], [], {overwrites}),
        ("epoch_1.pth", [], own, set()),
        ("epoch_1.pth", ["--resume"], [], set()),
    ):
        shutil.rmtree(folder)
        folder.mkdir()
        shutil.copy(detection.checkpoint, folder / name)
        options = ["--cfg-options", *detection.options, *options, wrong]
        _, _, errors = call("train", detection.config, "--work-dir", folder, *arguments, *options)
        assert {one for one in (overwrites, nothing) if one in errors} == expected, arguments


@pytest.mark.parametrize("validate", [True, False])
def test_the_validation_that_is_made_up_for_can_be_turned_off(validate):
    """The log of such a run says what is not exact."""
    ran, lines = [], []
    loop = SimpleNamespace(iter=4, max_iters=8, val_begin=1, dynamic_milestones=[0], dynamic_intervals=[2])
    runner = SimpleNamespace(
        _resume=True,
        train_loop=loop,
        optim_wrapper=SimpleNamespace(_accumulative_counts=2),
        val_loop=SimpleNamespace(run=lambda: ran.append(1)),
        logger=SimpleNamespace(info=lines.append),
    )
    hook = ExactResumeHook(validate=validate)
    hook.after_load_checkpoint(runner, {"meta": {}})
    hook.before_train(runner)
    assert bool(ran) == validate
    assert "will see other batches" in lines[0] and "gradients are accumulated" in lines[1]


@pytest.fixture
def work_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(work_dir_module, "PATIENCE", 0.0)
    return Config(dict(work_dir=str(tmp_path / "run"), launcher="none"))


def test_two_trainings_in_one_work_directory(work_dir):
    with reserved(work_dir):
        with pytest.raises(UserError, match="another training is running in .*run; let it end"), reserved(work_dir):
            pass
        with reserved(Config(dict(work_dir=f"{work_dir.work_dir}2", launcher="none"))):
            pass
    with reserved(work_dir):
        pass


def test_the_first_process_reserves_the_work_directory(work_dir, monkeypatch):
    work_dir.launcher = "pytorch"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")  # each on a machine of its own
    monkeypatch.setenv("RANK", "0")
    with reserved(work_dir):
        with pytest.raises(UserError, match="another training"), reserved(work_dir):
            pass
        monkeypatch.setenv("RANK", "1")
        with reserved(work_dir):
            pass


def test_a_file_system_without_locks(work_dir, monkeypatch):
    def acquire(self, timeout):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with reserved(work_dir), reserved(work_dir):
        pass


def test_a_training_beside_another_one(call, detection, work_dir):
    with reserved(work_dir):
        command = [detection.config, "--work-dir", work_dir.work_dir, "--cfg-options", *detection.options]
        status, _, errors = call("train", *command)
    assert status == 2 and "another training is running in" in error_lines(errors)[-1]
    assert not list(Path(work_dir.work_dir).glob("*.p*"))
