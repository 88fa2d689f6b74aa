"""Studies: refused settings, equal initial states of all variants, and a small study from first run to report."""

import gzip
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CONFIGS, ROOT, error_lines, run

pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from condattn.openmmlab.errors import UserError
from condattn.openmmlab.study import run as run_module
from condattn.openmmlab.study.check import check_metric, check_start, check_study
from condattn.openmmlab.study.plan import FINAL, RunId, load_study, pilot_runs, planned_runs
from condattn.openmmlab.study.report import begun_studies, is_complete, write_documents, write_report
from condattn.openmmlab.study.results import FAILED, Record, Results, versions
from condattn.openmmlab.study.run import read_curves, training_config

STUDIES = sorted((CONFIGS / "studies").glob("*.py"))
TINY = """
config = "_base_/vit_fashion_mnist.py"
title = "Does a tiny study run?"
data = dict(variable="FASHION_MNIST", default="data", source="the test writes them")
options = {
    "model.backbone.module.arch": dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16),
    "model.head.in_channels": 16,
    "train_dataloader.batch_size": 4,
    "val_dataloader.dataset.held_out": True,
    "train_cfg.max_iters": 4,
    "param_scheduler.0.end": 1,
    "param_scheduler.1.T_max": 4,
    "custom_hooks": [dict(type="SpectraHook")],
}
metric = "accuracy/top1"
unit = "points"
difference = 5.0
variants = dict(none={"model.backbone.conditioning": "none"}, pc={"model.backbone.conditioning": "pc"})
baseline = "none"
families = dict(methods=[("pc", "none")])
pilot_seeds = [7]
tuning = dict(option="optim_wrapper.optimizer.lr", grid=[1e-4, 1e-3], seeds=[5, 6], largest_grid=2)
seeds = [0, 1]
evaluations = 2
"""


def write_images(folder: Path, number: int = 60) -> Path:
    """Write random images and labels in the format of Fashion-MNIST; one of the files is compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (number, 28, 28), np.uint8), rng.integers(0, 10, number, np.uint8)
        header = struct.pack(">4B3I", 0, 0, 8, 3, number, 28, 28)
        with gzip.open(folder / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(header + images.tobytes())
        labels_file = folder / f"{name}-labels-idx1-ubyte"
        labels_file.write_bytes(struct.pack(">4BI", 0, 0, 8, 1, number) + labels.tobytes())
    return folder


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    folder = write_images(tmp_path / "images")
    monkeypatch.setenv("FASHION_MNIST", str(folder))
    return folder


@pytest.fixture
def study_file(tmp_path):
    """A function that writes a study with changed settings, beside its configuration."""
    (tmp_path / "_base_").mkdir()
    shutil.copy(CONFIGS / "studies" / "_base_" / "vit_fashion_mnist.py", tmp_path / "_base_")

    def write(*changes: tuple[str, str]) -> str:
        text = TINY
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "tiny.py").write_text(text)
        return str(tmp_path / "tiny.py")

    return write


def test_every_seed_starts_from_its_checkpoint(study_file, tmp_path):
    start = """
start = dict(checkpoint="pretrained/{seed}.pth", command="python pretrain.py --seed {seed}")
options["model.backbone.init_cfg"] = dict(type="Pretrained", checkpoint="{start}")
exploratory = True
"""
    plain = load_study(study_file())
    study = load_study(study_file(("seeds = [0, 1]\n", "seeds = [0, 1]\n" + start)))
    assert study.digest() != plain.digest() and "start" not in plain.definition()
    (tmp_path / "pretrained").mkdir()
    for seed in (5, 6, 7, 0):
        (tmp_path / "pretrained" / f"{seed}.pth").touch()
    with pytest.raises(UserError, match=r"no checkpoint .*1.pth to start from.*: python pretrain.py --seed 1$"):
        check_start(study, tmp_path)
    (tmp_path / "pretrained" / "1.pth").touch()
    check_start(study, tmp_path)
    cfg = training_config(study, RunId(FINAL, "pc", 1, 1e-3), tmp_path, tmp_path)
    assert cfg.model.backbone.init_cfg.checkpoint == str(tmp_path / "pretrained" / "1.pth")


@pytest.mark.parametrize(
    "change, message",
    [
        (("seeds = [0, 1]", "seeds = []"), "seeds is empty"),
        (("seeds = [0, 1]", "seeds = [3]"), "expected two or more seeds"),
        (("seeds = [0, 1]", "seeds = [0, 0]"), "seeds has a seed twice"),
        (("seeds = [0, 1]", "seeds = [0, 5]"), "seeds and tuning.seeds share \\[5\\]"),
        (("seeds=[5, 6]", "seeds=[6]"), "expected two or more tuning.seeds"),
        (("pilot_seeds = [7]", "pilot_seeds = [1]"), "seeds and pilot_seeds share \\[1\\]"),
        (('baseline = "none"', 'baseline = "nothing"'), "baseline names nothing; variants are none, pc"),
        (('[("pc", "none")]', '[("sc", "none")]'), "families.methods names sc"),
        (("grid=[1e-4, 1e-3]", "grid=[1e-3]"), "two or more positive learning rates"),
        (("difference = 5.0", "difference = 0"), "positive difference"),
        (('unit = "points"\n', ""), "a study needs unit"),
        (('unit = "points"', 'unit = "points"\nmetrik = 1'), "unknown settings metrik"),
        (('"_base_/vit_fashion_mnist.py"', '"_base_/nowhere.py"'), "no configuration"),
        (("variants = dict(none=", 'variants = dict(**{"a b": {}}, none='), "name of a variant, got 'a b'"),
    ],
)
def test_a_study_that_contradicts_itself(study_file, change, message):
    with pytest.raises(UserError, match=message):
        load_study(study_file(change))


@pytest.mark.parametrize(
    "change, message",
    [
        (('"train_cfg.max_iters": 4', '"train_cfg.iterations": 4'), "option train_cfg.iterations: .* no 'iterations'"),
        (('"train_cfg.max_iters": 4', '"train_cfg.max_iters": 5'), "multiple of 2 evaluations, found 5"),
        (('pc={"model.backbone.conditioning"', 'pc={"model.trunk.conditioning"'), "no 'trunk' there"),
        (('conditioning": "pc"', 'conditioning": "pcc"'), "variant pc: .*unknown conditioning 'pcc'"),
        (('conditioning": "pc"', 'colour": "pc"'), "variant pc: .*unexpected keyword argument 'colour'"),
        (('metric = "accuracy/top1"', 'metric = "accuracy/top3"'), "no metric 'accuracy/top3'.*accuracy/top1"),
        (('held_out": True', 'held_out": None'), "48 images serve training and tuning, such as training/0"),
    ],
)
def test_a_study_that_cannot_run(study_file, images, change, message):
    with pytest.raises(UserError, match=message):
        check_study(load_study(study_file(change)), Path(study_file(change)).parent)


def test_missing_data(study_file, monkeypatch, tmp_path):
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no data for training: no train-images-idx3-ubyte.*the test writes them"):
        check_study(load_study(study_file()), tmp_path)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_this_project(path):
    """In every size of every study, variants can be built, and differ only in the settings that they name."""
    for size in Config.fromfile(path).get("sizes") or {"": {}}:
        study = load_study(str(path), size)
        for variant in study.variants:
            cfg = training_config(study, RunId(FINAL, variant, 0, study.grid[0]), ROOT, ROOT)
            check_metric(study, cfg)
            assert cfg.train_cfg.val_interval * study.evaluations == cfg.train_cfg.max_iters
            scheduler = cfg.param_scheduler[-1]
            assert scheduler.T_max == cfg.train_cfg.max_iters


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_variants_start_from_equal_weights(path):
    """Variants of one seed have equal weights, except for those that a method adds, or sets."""
    from condattn.condition import conditioned_places
    from condattn.openmmlab.runner.launch import build_model, load_config

    study = load_study(str(path))
    load_config(str(study.config))
    states = {}
    for variant in study.variants:
        cfg = training_config(study, RunId(FINAL, variant, 3, study.grid[0]), ROOT, ROOT)
        torch.manual_seed(cfg.randomness.seed)
        if study.start:  # the same checkpoint for all
            cfg.model.backbone.init_cfg = None
        model = build_model(cfg)
        model.init_weights()
        states[variant] = model.state_dict()
        sites = [place for place, method in conditioned_places(model) if not method.changes_function]
        parts = [part for site in sites for part in (site.q, site.k, site.v) if part is not None]
        written = {id(getattr(part.owner, part.parameter)) for part in parts}
        for name, parameter in model.named_parameters():
            if id(parameter) in written:
                del states[variant][name]
    baseline = states[study.baseline]
    for variant, state in states.items():
        left_out = baseline.keys() - state.keys()
        assert all("qkv" in name for name in left_out) and bool(left_out) == ("ci" in variant), variant
        assert all(torch.equal(state[name], value) for name, value in baseline.items() if name in state), variant


def test_variants_see_equal_batches_from_equal_weights(study_file, images, tmp_path):
    """Tested with the runner, which draws further seeds."""
    study = load_study(study_file())
    seen = {}
    for variant in study.variants:
        cfg = training_config(study, RunId(FINAL, variant, 3, 1e-3), tmp_path, tmp_path)
        cfg.work_dir, cfg.experiment_name = str(tmp_path / variant), f"equal_{variant}"
        init_default_scope("mmpretrain")
        runner = Runner.from_cfg(cfg)
        runner._init_model_weights()
        batches = []
        iterator = iter(runner.build_dataloader(cfg.train_dataloader, seed=runner.seed))
        for _ in range(3):
            batches.append(torch.stack(next(iterator)["inputs"]))
        seen[variant] = (torch.stack(batches), runner.model.state_dict())
    (batches, weights), (other_batches, other_weights) = seen.values()
    assert torch.equal(batches, other_batches)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


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


def a_record(run: RunId, score: float, **values) -> Record:
    status = values.pop("status", "finished")
    reported = {"accuracy/top1": score + 1} if run.stage == FINAL and status == "finished" else {}
    return Record(run, status, score, reported, [[2, score - 1], [4, score]], **values)


def finish(results: Results, scores: dict) -> None:
    """Add every run that the study needs."""
    while missing := [r for r in planned_runs(results.study, results.scores()) if r not in results.scores()]:
        for one in missing:
            rate, seed = (1.0 if one.rate == 1e-3 else 0.0), (2.0 * one.seed if one.variant == "pc" else 0.0)
            results.add(a_record(one, scores[one.variant] + rate + seed, commit="abc"))


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
    page = (results.folder / "report.html").read_text()
    assert page.count("<svg") == 1 and "http" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    assert {path: path.read_bytes() for path in write_report(study, results)} == before


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
    page.write_text("".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("tiny", "pooled")))
    assert write_documents(tmp_path) == [page]
    assert "Incomplete: 0 of 12 runs" in page.read_text() and "svg)\n<!-- end pooled" not in page.read_text()
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


def test_results_of_another_study(study_file, tmp_path):
    results = Results(load_study(study_file()), tmp_path)
    results.write_header(commit="abc", versions={})
    other = Results(load_study(study_file(("difference = 5.0", "difference = 4.0"))), tmp_path)
    with pytest.raises(UserError, match="written by another study.*a study that has begun is not changed"):
        other.header()


def test_equal_trainings_of_two_studies_are_run_once(study_file, tmp_path, monkeypatch):
    """A run is taken over if configuration, metric, stage, commit and packages are equal; another one is executed."""
    first = load_study(study_file())
    second = replace(first, name="second", variants={"base": first.variants["none"], "pc": first.variants["pc"]})
    there, here = Results(first, tmp_path), Results(second, tmp_path)
    finals = [RunId(FINAL, variant, 1, 1e-3) for variant in ("none", "pc")]
    training = run_module._training(first, training_config(first, finals[0], tmp_path, tmp_path))
    record = a_record(finals[0], 61.0, commit="abc", versions=versions(), training=training)
    there.add(record)
    monkeypatch.setattr(run_module, "worktree", lambda root, commit: root)
    monkeypatch.setattr(run_module, "_call", lambda *arguments: "it was executed")
    base = replace(finals[0], variant="base")
    taken = run_module.execute(second, here, base, tmp_path, "abc")
    assert taken == here.records()[base] == replace(record, run=base, origin="tiny")
    here.write_header(commit="abc", versions={})
    write_report(second, here)
    assert "1 of the runs are those of tiny, the same trainings." in (here.folder / "report.md").read_text()
    tuning = replace(base, stage="tuning")
    for study, results, one, commit in (
        *((second, here, replace(base, seed=0), "abc"), (second, here, replace(base, rate=1e-4), "abc")),
        *((second, here, finals[1], "abc"), (second, here, base, "abd"), (second, here, tuning, "abc")),
        (replace(second, metric="accuracy/top5"), here, base, "abc"),
    ):
        with pytest.raises(run_module.RunError, match="it was executed"):
            run_module.execute(study, results, one, tmp_path, commit)


def test_broken_results(study_file, tmp_path):
    results = Results(load_study(study_file()), tmp_path)
    results.folder.mkdir(parents=True)
    for line, message in (('{"run"', "cannot be read as JSON"), ("{}", "not the record of a run"), ("[]", "object")):
        (results.folder / "runs.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=message):
            results.records()


def test_the_results_in_this_repository(tmp_path):
    """Tables equal those made from the data, byte for byte; figures depend on the version of Matplotlib."""
    for name in ("configs", "results", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for study, results in begun_studies(tmp_path):
        write_report(study, results)
        for name in ("report.md", "table.csv"):
            committed = ROOT / "results" / study.name / name
            assert (results.folder / name).read_bytes() == committed.read_bytes(), f"{study.name}: --report-only"
    write_documents(tmp_path)
    assert (tmp_path / "docs" / "results.md").read_bytes() == (ROOT / "docs" / "results.md").read_bytes()


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


@pytest.mark.slow
def test_from_the_first_run_to_the_report(repository):
    """The study is killed and restarted, then reported, listed and repeated, and refused with different code."""
    root, folder = repository, repository / "results" / "tiny"
    (line,) = error_lines(study(root, "--report-only", status=2).stderr)
    assert "no results of this study" in line
    listed = study(root, "--list").stdout.splitlines()
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


def test_bad_arguments(call, study_file, tmp_path):
    for arguments, part in (
        (("nowhere.py",), "no study file"),
        ((study_file(), "--only", "sc"), "--only: no variant sc"),
        ((study_file(), "--jobs", "0"), "--jobs: expected at least 1"),
        ((study_file(), "--size", "huge"), "no size 'huge'"),
    ):
        status, _, errors = call("study", *arguments)
        (line,) = error_lines(errors)
        assert status == 2 and part in line


def test_pilot_runs_are_of_the_baseline(study_file):
    study = load_study(study_file())
    assert pilot_runs(study) == [RunId("pilot", "none", 7, 1e-3)]
