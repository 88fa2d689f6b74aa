"""Helpers that run the command-line tools in tests."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
CONFIGS = ROOT / "configs"
DEMO = CONFIGS / "demo"
LOADERS = ("train", "val", "test")
NOWHERE = ["model.backbone.init_cfg.type=Pretrained", "model.backbone.init_cfg.checkpoint=nowhere.pth"]


def can_forward() -> bool:
    """Whether mmengine can skip a data loader forward to an iteration; its stock version cannot."""
    if not find_spec("mmengine"):
        return False
    from mmengine.runner import loops

    return hasattr(loops._InfiniteDataloaderIterator, "skip_iter")


def load_tool(name: str) -> ModuleType:
    """Load a tool, such as 'train' or 'checkpoints/fold', as a module."""
    spec = spec_from_file_location(f"condattn_tools_{name}", TOOLS / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="TorchInductor needs a C++ compiler"
)
forwarded = pytest.mark.skipif(not can_forward(), reason="this mmengine cannot forward a data loader")


class Malice:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@dataclass(frozen=True)
class Run:
    """A finished training of a demo configuration."""

    config: Path
    options: list[str]
    work_dir: Path
    checkpoint: Path
    output: str


def run(*command, cwd: Path, status: int = 0, **env: str) -> subprocess.CompletedProcess:
    """Run a tool in a new process; fail with its output unless it exits with ``status``."""
    if str(command[0]).endswith(".py"):
        command = (sys.executable, *command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **env}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == status, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def first_iteration(work_dir: Path) -> int:
    """The first iteration that the last run in a work directory logged, where each is: 1 unless it was resumed."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"))
    return min(values["step"] for values in map(json.loads, newest.read_text().splitlines()) if "lr" in values)


def free_port() -> str:
    """A free port for the rendezvous of processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def train(config: Path, options: list[str], folder: Path, checkpoint: str) -> Run:
    work_dir = folder / "run"
    result = run(TOOLS / "train.py", config, "--work-dir", work_dir, "--cfg-options", *options, cwd=folder)
    return Run(config, options, work_dir, work_dir / checkpoint, result.stdout + result.stderr)
