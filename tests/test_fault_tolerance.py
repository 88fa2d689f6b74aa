"""Resumed runs end with the same weights as uninterrupted ones; bad files and non-finite losses stop a run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from runs import DEMO, TOOLS, error_lines, first_iteration, forwarded, run
from torch import nn

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import BaseStorageBackend, FileClient, LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner

import condattn
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.hooks.atomic_checkpoint import AtomicCheckpointHook, atomic_writes
from condattn.openmmlab.hooks.exact_resume import ExactResumeHook
from condattn.openmmlab.hooks.finite_loss import find_trouble, weights_blamed
from condattn.openmmlab.runner import checkpoints, launch
from condattn.openmmlab.runner.checkpoints import check_same_start, find_resumable
from condattn.openmmlab.study.run import DIVERGED

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


def test_a_loss_that_is_not_a_number_stops_the_run(call, detection, tmp_path):
    checkpoint = torch.load(detection.checkpoint, weights_only=False)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("blocks.1.attn.w_msa.qkv.weight"))
    checkpoint["state_dict"][name][0, 0] = 3e38  # overflows in the first product
    torch.save(checkpoint, "bad.pth")
    options = [*detection.options, "load_from=bad.pth"]
    status, _, errors = call("train", detection.config, "--work-dir", "run", "--cfg-options", *options)
    assert status == 2
    (line,) = error_lines(errors)
    assert "is not finite in iteration 1" in line
    assert f"saturated logits at {name.removesuffix('.qkv.weight')}" in line
    assert "the last checkpoint is none" in line
    assert not list(Path("run").rglob("*.pth"))


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("svd failed"), ValueError("matrix contains NaN")])
def test_an_exception_after_an_update_with_gradients_that_overflowed(error, tmp_path):
    """It is explained by the weights, and counts as a divergence in a study; another exception is left as it is."""
    runner = SimpleNamespace(model=nn.Linear(2, 2), iter=3, work_dir=tmp_path)
    with pytest.raises(type(error), match=str(error)), weights_blamed(runner):
        raise error
    runner.model.bias.data[1] = float("nan")
    expected = f"bias is not finite in iteration 4 .{type(error).__name__}: {error}.; the last checkpoint is none"
    with pytest.raises(UserError, match=expected) as found, weights_blamed(runner):
        raise error
    assert DIVERGED in str(found.value)


def test_trouble_where_queries_share_keys():
    """The heads of queries and keys differ in number."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=24, intermediate_size=16, num_hidden_layers=1, vocab_size=8, max_position_embeddings=8)
    config = transformers.Qwen2Config(**sizes, num_attention_heads=3, num_key_value_heads=1)
    model = transformers.Qwen2Model(config)
    assert find_trouble(model, (torch.tensor([[1, 2, 3]]),), {}) == []
    model.layers[0].self_attn.k_proj.bias.data.fill_(1e6)
    assert find_trouble(model, (torch.tensor([[1, 2, 3]]),), {}) == ["saturated logits at layers.0.self_attn"]


def test_trouble_is_named_by_site():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            from timm.models.vision_transformer import Attention

            self.sound, self.long, self.silent, self.broken = (Attention(8, 2) for _ in range(4))
            self.long.qkv.weight.data *= 1e4
            self.silent.qkv.weight.data[16:] = 0
            self.broken.qkv.weight.data[0, 0] = float("inf")

        def forward(self, x):
            return [part(x) for part in (self.sound, self.long, self.silent, self.broken)]

    pytest.importorskip("timm")
    model = Model()
    condattn.condition(model, "pc")
    trouble = find_trouble(model, (torch.randn(1, 5, 8),), {})
    assert sorted(trouble) == sorted(
        [
            "saturated logits at long, broken",
            "zero rows at silent",
            "weights that are not finite at broken",
            "head outputs that are not finite at broken",
        ]
    )


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


def toy_runner(tmp_path, train_cfg, kind=Runner, **saving):
    """A runner of a model with one layer and a score that rises, which saves the best checkpoint."""
    loader = dict(dataset=[{"inputs": torch.ones(2)}] * 4, sampler=dict(type="DefaultSampler", shuffle=False))
    checkpoint = dict(type="AtomicCheckpointHook", by_epoch=True, interval=1, save_best="score", rule="greater")
    return kind(
        model=Toy(),
        work_dir=str(tmp_path / "run"),
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg=train_cfg,
        val_cfg={},
        val_evaluator=Evaluator(Rising()),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        default_hooks=dict(checkpoint={**checkpoint, **saving}),
        experiment_name=f"{tmp_path} {saving}",
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


def test_processes_that_find_different_checkpoints(monkeypatch):
    cfg = Config(dict(resume=True, load_from="run/epoch_3.pth"))
    check_same_start(cfg)
    monkeypatch.setattr(checkpoints, "all_gather_object", lambda own: [own, "none", own])
    with pytest.raises(UserError, match="epoch_3.pth by process 0, none by process 1"):
        check_same_start(cfg)


def test_a_training_over_an_earlier_one_warns(call, detection, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "epoch_1.pth").write_bytes(b"")
    options = [*detection.options, "model.neck.out_chanels=3"]
    _, _, errors = call("train", detection.config, "--work-dir", "run", "--cfg-options", *options)
    assert "run has checkpoints of an earlier training (epoch_1.pth), which this one overwrites" in errors


def test_a_configuration_without_checkpoint_hook_has_the_atomic_one(detection, tmp_path):
    for hooks in (None, {}, dict(checkpoint=dict(type="CheckpointHook", interval=2))):
        cfg = Config.fromfile(detection.config)
        cfg.default_hooks = hooks
        cfg.update(work_dir=str(tmp_path), launcher="none", experiment_name=f"hooks {hooks}")
        (hook,) = (one for one in launch.build_runner(cfg).hooks if isinstance(one, CheckpointHook))
        assert isinstance(hook, AtomicCheckpointHook) and hook.interval == (2 if hooks else -1)


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
