"""A small study: equal batches for all variants, and all its runs from the first to the report."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT, error_lines, run

pytest.importorskip("mmpretrain")

from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from tiny_study import TINY, write_images

import condattn.registry  # noqa: F401  registers the models
from condattn.openmmlab.runner.launch import build_runner
from condattn.openmmlab.study.plan import FINAL, RunId, load_study
from condattn.openmmlab.study.results import Results
from condattn.openmmlab.study.run import execute, git, training_config


def test_variants_see_equal_batches_from_equal_weights(study_file, study_images, tmp_path):
    """Also after training steps, in which the models draw different numbers of random numbers."""
    study = load_study(study_file())
    seen = {}
    for variant in study.variants:
        cfg = training_config(study, RunId(FINAL, variant, 3, 1e-3), tmp_path, tmp_path)
        cfg.work_dir, cfg.experiment_name = str(tmp_path / variant), f"equal_{variant}"
        cfg.model.backbone.module.drop_rate = 0.0 if variant == "none" else 0.5
        init_default_scope("mmpretrain")
        cfg.launcher = "none"
        runner = build_runner(cfg)  # with the hooks of a real run
        seen[variant] = recorder = Recorder()
        runner.register_hook(recorder, priority="LOWEST")
        runner.train()
    (batches, weights), (other_batches, other_weights) = ((one.batches, one.weights) for one in seen.values())
    assert len(batches) == 4 and torch.equal(torch.stack(batches), torch.stack(other_batches))
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


class Recorder(Hook):
    """Records the weights before the training, and the images of each iteration."""

    def before_train(self, runner):
        self.weights = {name: value.clone() for name, value in runner.model.state_dict().items()}
        self.batches = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.batches.append(torch.stack(data_batch["inputs"]).clone())


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with the tools, the package, and a tiny study with its data."""
    root = tmp_path_factory.mktemp("repository")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("projects", "tools", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    (root / "configs" / "studies" / "tiny.py").write_text(TINY)
    (root / ".gitignore").write_text("work_dirs/\n__pycache__/\n")
    write_images(root / "data")
    git = ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "projects", "tools", "configs", ".gitignore"], check=True)
    subprocess.run([*git, "commit", "-qm", "code"], check=True)
    return root


def study(root: Path, *arguments, status: int = 0, **env: str):
    command = (root / "tools" / "study.py", "configs/studies/tiny.py", *arguments)
    return run(*command, cwd=root, status=status, PYTHONPATH=str(root / "projects"), **env)


def processes_of(root: Path, tool: str) -> set[str]:
    """Numbers of running processes that name a tool below ``root``."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found[path.parent.name] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return {number for number, line in found.items() if str(root) in line and tool in line}


@pytest.mark.slow
def test_from_the_first_run_to_the_report(repository):
    """The study is killed and restarted, then reported, listed and repeated, and refused with different code."""
    root, folder = repository, repository / "results" / "tiny"
    (line,) = error_lines(study(root, "--report-only", status=2).stderr)
    assert "no results of this study" in line
    (line,) = error_lines(study(root, "--list", "--commit", "nothing", status=2).stderr)
    assert "nothing^{commit}" in line
    listed = study(root, "--list", "--commit", "HEAD").stdout.splitlines()
    assert len(listed) == 8 and all("--run tuning/" in line for line in listed if "study.py" in line)

    environment = {**os.environ, "PYTHONPATH": str(root / "projects")}
    command = [sys.executable, root / "tools" / "study.py", "configs/studies/tiny.py", "--jobs", "2"]
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (folder / "runs.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (folder / "runs.jsonl").read_text().splitlines()
    assert first
    orphans = processes_of(root, "train.py")  # of the process that was killed

    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not processes_of(root, "train.py") - orphans and time.monotonic() < deadline + 300:
        time.sleep(0.2)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert not processes_of(root, "train.py")

    output = study(root, "--jobs", "2").stdout
    assert "results/tiny/report.md" in output
    records = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert set(first) <= {json.dumps(record, sort_keys=True) for record in records}
    finals = [record for record in records if record["run"]["stage"] == "final"]
    assert len(finals) == 4 and all(record["reported"]["accuracy/top1"] >= 0 for record in finals)
    assert all([step for step, _ in record["curve"]] == [2, 4] for record in records)
    assert all("entropy" in record["spectra"] for record in records)
    report = (folder / "report.md").read_text()
    assert "Complete: " in report and "| pc - none |" in report
    assert not list((root / "work_dirs").rglob("*.pth"))
    assert (folder / "spectra.svg").exists()

    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "results/tiny/report.md" in study(root, "--report-only").stdout
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert study(root, "--list").stdout.count("--run") == 0

    readme = root / "projects" / "condattn" / "note.py"
    readme.write_text('"""Another commit."""\n')
    git = ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "add", "projects"], check=True)
    subprocess.run([*git, "commit", "-qm", "more"], check=True)
    (line,) = error_lines(study(root, "--list", "--commit", "HEAD", status=2).stderr)
    assert "--commit: tiny began with" in line
    assert "is the same bit for bit" in study(root, "--rerun", "pc/0").stdout
    header = json.loads((folder / "study.json").read_text())
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert header["commit"] == head and header["verified"] == [f"pc/0 at {head}"]
    (line,) = error_lines(study(root, "--rerun", "pc/77", status=2).stderr)
    assert "expected a finished run such as" in line
    text = (root / "configs" / "studies" / "tiny.py").read_text()
    (root / "configs" / "studies" / "tiny.py").write_text(text.replace("difference = 5.0", "difference = 4.0"))
    (line,) = error_lines(study(root, "--report-only", status=2).stderr)
    assert "written by another study" in line


@pytest.mark.slow
def test_a_training_whose_record_was_not_written_is_not_repeated(repository, monkeypatch):
    """It is resumed from its last checkpoint, as one that was cut off."""
    path = repository / "configs" / "studies" / "again.py"
    path.write_text(TINY)
    study, one = load_study(str(path)), RunId("tuning", "pc", 5, 1e-4)
    results = Results(study, repository)
    monkeypatch.setenv("FASHION_MNIST", str(repository / "data"))
    commit = git(repository, "rev-parse", "HEAD")

    def no_space(record):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full, pytest.raises(OSError, match="No space left"):
        full.setattr(results, "add", no_space)
        execute(study, results, one, repository, commit)
    folder = results.work / "runs" / str(one).replace("/", "_")
    record = execute(study, results, one, repository, commit)
    assert "iter: 4" in (folder / "train.log").read_text().split("resumed epoch", 1)[1].splitlines()[0]
    assert results.records() == {one: record} and [step for step, _ in record.curve] == [2, 4]
    assert not (folder / "train").exists()
