"""Out of one process: the same training in several, on several machines, in steps, compiled, and in less memory."""

import os
import subprocess
import sys

import pytest
import torch
from runs import DEMO, TOOLS, run

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

# Every sample once, no warm-up, a loss that is the mean over samples, and a rate at which rounding stays rounding.
PLAIN = """
model = dict(decode_head=dict(loss_decode=dict(class_weight=None)))
randomness = dict(seed=0)
train_dataloader = dict(sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True))
param_scheduler = []
optim_wrapper = dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
default_hooks = dict(logger=dict(interval=1))
"""


@pytest.fixture
def plain(small, tmp_path):
    """The command of a short, plain training of the demo segmenter; and the weights that it ends with."""
    (tmp_path / "plain.py").write_text(f"_base_ = {str(DEMO / 'upernet_swin_pc.py')!r}\n{PLAIN}")

    def train(name, *options, iterations=2, script=(TOOLS / "train.py",), flags=(), environments=({},)):
        settings = [
            *small,
            f"train_cfg.max_iters={iterations}",
            f"train_cfg.val_interval={iterations}",
            f"default_hooks.checkpoint.interval={iterations}",
            *options,
        ]
        start, *rest = script
        command = [
            start,
            tmp_path / "plain.py",
            *rest,
            "--work-dir",
            tmp_path / name,
            *flags,
            "--cfg-options",
            *settings,
        ]
        if len(environments) == 1:
            run(*command, cwd=tmp_path, **environments[0])
        else:
            together([sys.executable, *command], tmp_path, environments)
        return torch.load(tmp_path / name / f"iter_{iterations}.pth", weights_only=False)["state_dict"]

    return train


def together(command, folder, environments):
    """Run a command once for each environment, at the same time; all must end well."""
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    processes = [
        subprocess.Popen([str(part) for part in command], env={**base, **env}, **pipes) for env in environments
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-3000:]


def check_close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_train_as_one_with_both_batches(plain):
    one = plain("one", "train_dataloader.batch_size=4")
    before = plain("before", "train_dataloader.batch_size=4", "optim_wrapper.optimizer.lr=0.0")
    moved = [name for name in one if not torch.allclose(one[name], before[name], rtol=1e-4, atol=1e-5)]
    assert len(moved) > len(one) // 2
    two = plain(
        "two",
        "train_dataloader.batch_size=2",
        script=(TOOLS / "train.py", "--launcher", "pytorch"),
        environments=[
            dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="29731")
            for rank in range(2)
        ],
    )
    check_close(two, one)


@pytest.mark.slow
def test_two_machines_train_together(plain, tmp_path):
    """Two torchrun nodes on loopback addresses, one process each."""
    one = plain("one", "train_dataloader.batch_size=4")
    launcher = tmp_path / "node.py"
    launcher.write_text(
        "import subprocess, sys\n"
        f"sys.exit(subprocess.call(['bash', {str(TOOLS / 'dist_train.sh')!r}, sys.argv[1], '1', *sys.argv[2:]]))\n"
    )
    nodes = [dict(NNODES="2", NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1", PORT="29741") for rank in range(2)]
    two = plain("nodes", "train_dataloader.batch_size=2", script=(launcher,), environments=nodes)
    check_close(two, one)


def test_gradients_are_accumulated(plain):
    one = plain("one", "train_dataloader.batch_size=4", iterations=1)
    steps = plain("steps", "train_dataloader.batch_size=2", "optim_wrapper.accumulative_counts=2", iterations=2)
    check_close(steps, one)


@pytest.mark.slow
def test_activations_are_recomputed(plain):
    check_close(plain("less", "model.backbone.with_cp=True"), plain("all"))


@pytest.mark.slow
def test_a_compiled_backbone(plain):
    check_close(plain("compiled", flags=("--compile", "eager")), plain("eager"))


def test_a_backend_that_is_not_there(refuse):
    refuse("train", DEMO / "upernet_swin_pc.py", "--compile", "abacus", parts=("--compile", "abacus", "inductor"))
