"""Checkpoints are written atomically, where the settings say, and the best one is kept."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from runs import error_lines
from torch import nn

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import BaseStorageBackend, FileClient, LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner

from condattn.openmmlab.errors import UserError
from condattn.openmmlab.hooks.atomic_checkpoint import AtomicCheckpointHook, atomic_writes
from condattn.openmmlab.hooks.exact_resume import ExactResumeHook
from condattn.openmmlab.runner import launch
from condattn.openmmlab.runner.checkpoints import find_resumable


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"old")

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"), atomic_writes():
        LocalBackend().put(b"new content", tmp_path / "a.pth")
    assert (tmp_path / "a.pth").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_training_on_a_full_disk_names_the_last_whole_checkpoint(call, detection, tmp_path, monkeypatch):
    from condattn.openmmlab.hooks import atomic_checkpoint

    write, count = atomic_checkpoint.write_atomically, []

    def full_at_the_second(path, *args, **kwargs):
        count.append(path)
        if Path(path).name == "epoch_2.pth":
            raise OSError(28, "No space left on device")
        write(path, *args, **kwargs)

    monkeypatch.setattr(atomic_checkpoint, "write_atomically", full_at_the_second)
    options = [*detection.options, "train_cfg.max_epochs=2", "default_hooks.checkpoint.max_keep_ckpts=1"]
    status, _, errors = call("train", detection.config, "--work-dir", "run", "--cfg-options", *options)
    assert status == 2
    (line,) = error_lines(errors)
    assert "epoch_2.pth could not be written" in line and "the newest complete one is" in line and "epoch_1.pth" in line
    assert find_resumable("run").endswith("epoch_1.pth")


def test_the_best_checkpoint_is_kept_until_the_next_is_there(tmp_path, monkeypatch):
    hook, runner = AtomicCheckpointHook(interval=1), SimpleNamespace(epoch=1, iter=2)
    hook.file_backend = LocalBackend()
    (tmp_path / "best.pth").write_bytes(b"old")
    full = []

    def save(self, runner, metrics):
        self.file_backend.remove(tmp_path / "best.pth")
        if full:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointHook, "_save_best_checkpoint", save)
    full.append(True)
    with pytest.raises(UserError, match="could not be written .*No space left.*the one before it is .*best.pth"):
        hook._save_best_checkpoint(runner, {})
    assert (tmp_path / "best.pth").read_bytes() == b"old"
    full.clear()
    hook._save_best_checkpoint(runner, {})
    assert not (tmp_path / "best.pth").exists()


class Bucket(BaseStorageBackend):
    """A store that is no file system."""

    content: ClassVar[dict[str, bytes]] = {}

    def get(self, filepath):
        return self.content[filepath]

    get_text = get

    def put(self, obj, filepath):
        self.content[filepath] = obj

    def join_path(self, *parts):
        return "/".join(parts)

    def isfile(self, filepath):
        return filepath in self.content

    def isdir(self, filepath):
        return False

    def remove(self, filepath):
        del self.content[filepath]


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return {"loss": self.layer(torch.stack(inputs)).sum()} if mode == "loss" else [0]


class Rising(BaseMetric):
    """A score that is better each time."""

    score = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        Rising.score += 1
        return {"score": Rising.score}


def toy_runner(tmp_path, train_cfg, kind=Runner, work_dir="run", resume=None, **saving):
    """A runner of a model with one layer and a score that rises, which saves the best checkpoint."""
    loader = dict(dataset=[{"inputs": torch.ones(2)}] * 4, sampler=dict(type="DefaultSampler", shuffle=False))
    checkpoint = dict(type="AtomicCheckpointHook", by_epoch=True, interval=1, save_best="score", rule="greater")
    return kind(
        model=Toy(),
        work_dir=str(tmp_path / work_dir),
        load_from=resume,
        resume=resume is not None,
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg=train_cfg,
        val_cfg={},
        val_evaluator=Evaluator(Rising()),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        default_hooks=dict(checkpoint={**checkpoint, **saving}),
        experiment_name=f"{tmp_path} {work_dir} {saving}",
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(out_dir="bucket://here"),
        dict(out_dir="bucket://here", backend_args={}),
        dict(out_dir="bucket://here", file_client_args=dict(backend="bucket")),
        dict(file_client_args=dict(backend="disk")),
        {},
    ],
    ids=str,
)
def test_checkpoints_are_written_where_the_settings_say(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Bucket, "content", {})
    register_backend("bucket", Bucket, force=True, prefixes="bucket")
    FileClient.register_backend("bucket", Bucket, force=True, prefixes="bucket")
    toy_runner(tmp_path, dict(by_epoch=True, max_epochs=3, val_interval=1), max_keep_ckpts=1, **settings).train()
    names = ["best_score_epoch_3.pth", "epoch_3.pth"]
    remote = [f"bucket://here/run/{name}" for name in names] if "out_dir" in settings else []
    assert sorted(Bucket.content) == remote
    assert sorted(path.name for path in tmp_path.rglob("*.pth")) == ([] if remote else names)
    assert not (tmp_path / "bucket:").exists()


def test_a_best_checkpoint_with_the_name_of_the_one_before_it_is_kept(tmp_path):
    """In a training by iterations whose hook counts epochs, every one has this name."""
    toy_runner(tmp_path, dict(by_epoch=False, max_iters=4, val_interval=1), interval=-1).train()
    assert [path.name for path in (tmp_path / "run").glob("best_*.pth")] == ["best_score_epoch_0.pth"]
    checkpoint = torch.load(tmp_path / "run" / "best_score_epoch_0.pth", weights_only=False)
    assert checkpoint["meta"]["iter"] == 4


def names_of(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


@pytest.mark.parametrize("scores", ["score", ["score", "other"]])
def test_the_best_checkpoint_of_a_training_in_another_folder_is_kept(tmp_path, monkeypatch, scores):
    """A training that goes on with it deletes its own best checkpoints alone."""
    monkeypatch.setattr(
        Rising, "compute_metrics", lambda self, results: dict.fromkeys(("score", "other"), next(rising))
    )
    rising = iter(range(1, 9))
    toy_runner(tmp_path, dict(by_epoch=True, max_epochs=2, val_interval=1), work_dir="a", save_best=scores).train()
    before = names_of(tmp_path / "a")
    settings = dict(resume=str(tmp_path / "a" / "epoch_2.pth"), save_best=scores)
    toy_runner(tmp_path, dict(by_epoch=True, max_epochs=4, val_interval=1), work_dir="b", **settings).train()
    best = [f"best_{name}_epoch_{{}}.pth" for name in ([scores] if isinstance(scores, str) else sorted(scores))]
    assert names_of(tmp_path / "a") == before == [*(name.format(2) for name in best), "epoch_1.pth", "epoch_2.pth"]
    assert names_of(tmp_path / "b") == [*(name.format(4) for name in best), "epoch_3.pth", "epoch_4.pth"]


def test_a_folder_that_was_copied_goes_on_with_its_own_files(tmp_path):
    toy_runner(tmp_path, dict(by_epoch=True, max_epochs=2, val_interval=1), work_dir="a").train()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert find_resumable(str(tmp_path / "b")) == str(tmp_path / "b" / "epoch_2.pth")
    settings = dict(work_dir="b", resume=str(tmp_path / "b" / "epoch_2.pth"))
    toy_runner(tmp_path, dict(by_epoch=True, max_epochs=3, val_interval=1), **settings).train()
    assert "best_score_epoch_2.pth" in names_of(tmp_path / "a")
    assert [name for name in names_of(tmp_path / "b") if "best" in name] == ["best_score_epoch_3.pth"]


def test_another_hook_that_saves_nothing_does_not_mark_a_checkpoint(tmp_path):
    runner = toy_runner(tmp_path, dict(by_epoch=True, max_epochs=1, val_interval=1))
    runner.register_hook(AtomicCheckpointHook(by_epoch=False, interval=100))
    runner.train()
    meta = torch.load(tmp_path / "run" / "best_score_epoch_1.pth", weights_only=False)["meta"]
    assert meta["validated"] is True and meta["within_epoch"] is False


def test_a_checkpoint_within_an_epoch(tmp_path):
    """The epoch begins anew, which is said, and nothing is validated before."""
    train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
    toy_runner(tmp_path, train_cfg, by_epoch=False, interval=3, save_best=None).train()
    runs = {}
    for name in ("iter_6.pth", "iter_3.pth"):
        resume = str(tmp_path / "run" / name)
        runs[name] = runner = toy_runner(tmp_path, train_cfg, work_dir=name, resume=resume, save_best=None)
        runner.register_hook(ExactResumeHook())
        Rising.score = 0
        runner.train()
        (log,) = (tmp_path / name).glob("*/*.log")
        epoch, iteration = {"iter_6.pth": (2, 6), "iter_3.pth": (1, 3)}[name]
        assert f"saved within epoch {epoch}, after iteration {iteration}; that epoch begins anew" in log.read_text()
        assert Rising.score == 3 - epoch and "follows now" not in log.read_text()


def test_partial_files_of_others_stay(tmp_path):
    (tmp_path / "run").mkdir()
    for name in (
        ".epoch_1.pth.x.part",
        ".best_score_epoch_1.pth.x.part",
        ".last_checkpoint.x.part",
        ".other.pth.x.part",
    ):
        (tmp_path / "run" / name).touch()
    toy_runner(tmp_path, dict(by_epoch=True, max_epochs=1, val_interval=1)).train()
    assert [path.name for path in (tmp_path / "run").glob(".*.part")] == [".other.pth.x.part"]


def test_writes_of_the_flexible_runner_are_atomic(tmp_path, monkeypatch):
    written, replace = [], Path.replace

    def record(self, target):
        written.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", record)
    toy_runner(tmp_path, dict(by_epoch=True, max_epochs=1, val_interval=1), FlexibleRunner).train()
    assert {"epoch_1.pth", "best_score_epoch_1.pth"} <= set(written)


def test_a_score_that_the_validation_does_not_report(tmp_path):
    toy_runner(tmp_path, dict(by_epoch=True, max_epochs=1, val_interval=1), save_best="other").train()
    (log,) = (tmp_path / "run").glob("*/*.log")
    assert "save_best names other, and the validation reports score" in log.read_text()
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["epoch_1.pth"]


def test_a_configuration_without_checkpoint_hook_has_the_atomic_one(detection, tmp_path):
    for hooks in (None, {}, dict(checkpoint=dict(type="CheckpointHook", interval=2))):
        cfg = Config.fromfile(detection.config)
        cfg.default_hooks = hooks
        cfg.update(work_dir=str(tmp_path), launcher="none", experiment_name=f"hooks {hooks}")
        (hook,) = (one for one in launch.build_runner(cfg).hooks if isinstance(one, CheckpointHook))
        assert isinstance(hook, AtomicCheckpointHook) and hook.interval == (2 if hooks else -1)
