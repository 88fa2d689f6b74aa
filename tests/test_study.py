"""Studies: refused settings, equal initial states of all variants, and a small study from first run to report."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import CONFIGS, ROOT, error_lines, run

pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from tiny_study import TINY, finish, write_images

import condattn.registry  # noqa: F401  registers the models
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.runner.launch import build_runner
from condattn.openmmlab.study.check import check_metric, check_start, check_study
from condattn.openmmlab.study.plan import FINAL, RunId, load_study, pilot_runs, planned_runs
from condattn.openmmlab.study.report import write_report
from condattn.openmmlab.study.results import Results
from condattn.openmmlab.study.run import LOADERS, execute, git, training_config
from condattn.openmmlab.study.schedule import run_command

STUDIES = sorted((CONFIGS / "studies").glob("*.py"))


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    folder = write_images(tmp_path / "images")
    monkeypatch.setenv("FASHION_MNIST", str(folder))
    return folder


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
    for seed in (5, 6, 7, 8, 0):
        (tmp_path / "pretrained" / f"{seed}.pth").touch()
    with pytest.raises(UserError, match=r"no checkpoint .*1.pth to start from.*: python pretrain.py --seed 1$"):
        check_start(study, tmp_path)
    (tmp_path / "pretrained" / "1.pth").touch()
    check_start(study, tmp_path)
    for wrong in ("pretrained/5.pth", "{seed}{other}.pth", "{seed}{}.pth", "{seed"):
        changed = start.replace("pretrained/{seed}.pth", wrong)
        with pytest.raises(UserError, match=r"expected start=dict\(checkpoint='... \{seed\} ...'"):
            load_study(study_file(("seeds = [0, 1]\n", "seeds = [0, 1]\n" + changed)))
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
        (("pilot_seeds = [7, 8]", "pilot_seeds = [7, 1]"), "seeds and pilot_seeds share \\[1\\]"),
        (("pilot_seeds = [7, 8]", "pilot_seeds = [7]"), "expected two or more pilot_seeds"),
        (('baseline = "none"', 'baseline = "nothing"'), "baseline names nothing; variants are none, pc"),
        (('[("pc", "none")]', '[("sc", "none")]'), "families.methods names sc"),
        (
            ("grid=[1e-4, 1e-3]", "grid=[1e-3]"),
            r"one rate, so that there is nothing to tune; expected tuning.seeds=\[\]",
        ),
        (("grid=[1e-4, 1e-3]", "grid=[1e-3, 1e-3]"), "different positive learning rates"),
        (("grid=[1e-4, 1e-3]", "grid=[]"), "different positive learning rates"),
        (("seeds=[5, 6]", "seeds=[]"), "tuning.seeds is empty"),
        (('tuning = dict(option="optim_wrapper.optimizer.lr", ', "tuning = dict("), r"expected tuning=dict\(option"),
        (('families = dict(methods=[("pc", "none")])', "families = dict()"), r"expected families=dict\(NAME"),
        (('[("pc", "none")]', "[]"), r"expected families=dict\(NAME"),
        (('[("pc", "none")]', '[("pc", "none", "pc")]'), r"expected families=dict\(NAME"),
        (('[("pc", "none")]', '("pc", "none")'), r"expected families=dict\(NAME"),
        (("seeds = [0, 1]", "seeds = 3"), "expected list or tuple as seeds, got 3"),
        (("seeds = [0, 1]", "seeds = [0, 1.5]"), r"expected whole numbers .* as seeds, got \[0, 1.5\]"),
        (("seeds = [0, 1]", "seeds = [-1, 1]"), r"whole numbers from 0 to 2\*\*32 - 1 as seeds, got \[-1, 1\]"),
        (("seeds = [0, 1]", "seeds = [0, 2**40]"), "whole numbers from 0 .* as seeds"),
        (('[("pc", "none")]', '[("pc", "pc")]'), r"families.methods: expected different variants, .*: \('pc', 'pc'\)"),
        (('[("pc", "none")]', '[("pc", "none")] * 2'), "expected different variants, and each pair once"),
        (('[("pc", "none")]', '[(["pc"], "none")]'), r"expected families=dict\(NAME"),
        (('variable="FASHION_MNIST"', "variable=3"), "data: expected a text as variable"),
        (
            ("variants = dict(none=", "variants = dict(**{'a': {3: 1}}, none="),
            "variants: expected a dict of options as a",
        ),
        (('unit = "points"', 'unit = "points"\nfactor = -1.0'), "expected a positive number as factor, got -1.0"),
        (("difference = 5.0", "difference = float('nan')"), "expected a positive number as difference, got nan"),
        (("seeds=[5, 6]", "seeds=5"), "tuning: expected list or tuple as seeds, got 5"),
        (("grid=[1e-4, 1e-3]", 'grid=["a", 1e-3]'), "expected numbers in tuning.grid"),
        (("difference = 5.0", 'difference = "1"'), "expected int or float as difference, got '1'"),
        (("evaluations = 2", "evaluations = True"), "expected int as evaluations, got True"),
        (('pc={"model.backbone.conditioning": "pc"}', "pc=1"), "variants: expected a dict of options as pc"),
        (('pc={"model', 'pc={"optim_wrapper.optimizer.lr": -1.0, "model'), "pc: expected a positive number as optim_w"),
        (("evaluations = 2", "evaluations = 0"), "one or more evaluations, got 0"),
        (("evaluations = 2", "evaluations = undefined"), "cannot read the study .*NameError"),
        (("difference = 5.0", "difference = 0"), "expected a positive number as difference, got 0"),
        (('unit = "points"\n', ""), "a study needs unit"),
        (('unit = "points"', 'unit = "points"\nmetrik = 1'), "unknown settings metrik"),
        (('dict(variable="FASHION_MNIST", default="data", ', "dict("), r"expected data=dict\(variable=..., default"),
        (("variants = dict(none=", 'variants = dict(**{"a b": {}}, none='), "name of a variant, got 'a b'"),
    ],
)
def test_a_study_that_contradicts_itself(study_file, change, message):
    with pytest.raises(UserError, match=message):
        load_study(study_file(change))


@pytest.mark.parametrize(
    "change, message",
    [
        (('"_base_/vit_fashion_mnist.py"', '"_base_/nowhere.py"'), "no configuration .*nowhere.py; correct"),
        (('"train_cfg.max_iters": 4', '"train_cfg.iterations": 4'), "option train_cfg.iterations: .* no 'iterations'"),
        (('"train_cfg.max_iters": 4', '"train_cfg.max_iters": 5'), "multiple of 2 evaluations, found 5"),
        (('"train_cfg.max_iters": 4', '"train_cfg.max_iters": "4"'), "multiple of 2 evaluations, found 4"),
        (('"model.head.in_channels": 16', '"model.head.loss.type.a": 1'), "option model.head.loss.type.a"),
        (('"train_cfg.max_iters": 4', '"model.train_cfg": dict(a=1), "model.train_cfg.b": 2'), "no 'b' there"),
        (('pc={"model.backbone.conditioning"', 'pc={"model.trunk.conditioning"'), "no 'trunk' there"),
        (('conditioning": "pc"', 'conditioning": "pcc"'), "variant pc: .*unknown conditioning 'pcc'"),
        (('conditioning": "pc"', 'colour": "pc"'), "variant pc: .*unexpected keyword argument 'colour'"),
        (('metric = "accuracy/top1"', 'metric = "accuracy/top3"'), "no metric 'accuracy/top3'.*accuracy/top1"),
        (('held_out": True', 'held_out": None'), "48 images serve training and tuning, such as training/0"),
    ],
)
def test_a_study_that_cannot_run(study_file, images, change, message):
    root = Path(study_file(change)).parent
    with pytest.raises(UserError, match=message):
        check_study(load_study(study_file(change)), root, root)


def test_missing_data(study_file, monkeypatch, tmp_path):
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "nowhere"))
    with pytest.raises(
        UserError, match="no data for training, or too few: no train-images-idx3-ubyte.*the test writes them"
    ):
        check_study(load_study(study_file()), tmp_path, tmp_path)


def test_too_few_data(study_file, images, tmp_path):
    """mmengine's data sets index their samples with ``indices``."""
    study = load_study(study_file())

    def too_few(*arguments):
        raise IndexError("list index out of range")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="no data for training, or too few: Ind"):
        patch.setattr("mmengine.registry.DATASETS.build", too_few)
        check_study(study, tmp_path, tmp_path)


def test_evaluators_whose_metrics_are_not_known_do_not_hide_the_others(study_file, tmp_path):
    study = load_study(study_file())
    cfg = training_config(study, RunId(FINAL, "pc", 1, 1e-3), tmp_path, tmp_path)
    cfg.val_evaluator = dict(type="SomeMetric")
    check_metric(study, cfg)
    with pytest.raises(UserError, match="no metric 'other'; the evaluators report accuracy/top1"):
        check_metric(replace(study, metric="other"), cfg)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_this_project(path):
    """In every size of every study, variants can be configured; training and evaluations see images of one scale."""
    for size in Config.fromfile(path).get("sizes") or {"": {}}:
        study = load_study(str(path), size)
        for variant in study.variants:
            cfg = training_config(study, RunId(FINAL, variant, 0, study.grid[0]), ROOT, ROOT)
            import_modules_from_strings(**cfg.get("custom_imports", {"imports": []}))
            check_metric(study, cfg)
            with pytest.raises(UserError, match=f"no metric 'other'; the evaluators report .*{study.metric}"):
                check_metric(replace(study, metric="other"), cfg)
            assert cfg.train_cfg.val_interval * study.evaluations == cfg.train_cfg.max_iters
            scheduler = cfg.param_scheduler[-1]
            assert scheduler.T_max == cfg.train_cfg.max_iters
        pipelines = [cfg[loader].dataset.get("pipeline", ()) for loader in LOADERS]
        scales = [step.scale for steps in pipelines for step in steps if "Resize" in step.type]
        assert len(set(scales)) <= 1, size  # tuples, because mmcv takes no lists


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_models_of_the_studies_fit_together(path):
    """In every size, the last variant of a detector, a segmenter or a classifier computes losses or scores."""
    from mmdet.testing import demo_mm_inputs

    from condattn.openmmlab.runner.launch import build_model, load_config

    for size in Config.fromfile(path).get("sizes") or {"": {}}:
        study = load_study(str(path), size)
        load_config(str(study.config))
        cfg = training_config(study, RunId(FINAL, list(study.variants)[-1], 0, study.grid[0]), ROOT, ROOT)
        if cfg.model.type not in ("MaskRCNN", "EncoderDecoder", "ImageClassifier"):
            return  # their projects have tests that train them
        if study.start:
            cfg.model.backbone.init_cfg = None
        model = build_model(cfg).train()
        if cfg.model.type == "MaskRCNN":
            data = demo_mm_inputs(2, [[3, 128, 128]] * 2, num_items=[3, 3], num_classes=2, with_mask=True)
            for sample in data["data_samples"]:
                sample.gt_instances.labels.zero_()
            losses = model(**model.data_preprocessor(data, training=True), mode="loss")
            flat = [value for one in losses.values() for value in (one if isinstance(one, list) else [one])]
            assert {"loss_rpn_cls", "loss_bbox", "loss_mask"} <= losses.keys()
            assert all(value.isfinite().all() for value in flat)
        else:
            shape = (2, 1, 28, 28) if cfg.model.type == "ImageClassifier" else (2, 3, 128, 128)
            scores = model(torch.rand(shape), mode="tensor")
            scores = scores if isinstance(scores, torch.Tensor) else scores[-1]
            assert len(scores) == 2 and scores.isfinite().all()


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


def test_learning_rates_have_the_digits_of_the_names_of_runs(study_file):
    """So that a run is found by its name."""
    study = load_study(study_file(("grid=[1e-4, 1e-3]", "grid=[10**-3.5, 1e-3 / 3]")))
    assert study.grid == [0.000316228, 0.000333333]
    assert all(float(str(run).split("/")[3]) == run.rate for run in planned_runs(study, {}))


def test_rates_that_a_study_fixes(study_file, tmp_path):
    """A variant that sets the rate, and all variants of a grid with one rate, are not tuned."""
    slow = ('pc={"model', 'pc={"optim_wrapper.optimizer.lr": 5e-5, "model')
    study = load_study(study_file(slow))
    assert {run.variant for run in planned_runs(study, {})} == {"none"}
    scores = dict.fromkeys(planned_runs(study, {}), 1.0) | {RunId("tuning", "none", 5, 1e-4): 9.0}
    finals = [run for run in planned_runs(study, scores) if run.stage == FINAL]
    assert {(run.variant, run.rate) for run in finals} == {("none", 1e-4), ("pc", 5e-5)}
    assert training_config(study, finals[1], tmp_path, tmp_path).optim_wrapper.optimizer.lr == 5e-5

    study = load_study(study_file(slow, ("grid=[1e-4, 1e-3], seeds=[5, 6]", "grid=[1e-3], seeds=[]")))
    assert [str(run) for run in planned_runs(study, {})] == [
        *("final/none/0/0.001", "final/pc/0/5e-05", "final/none/1/0.001", "final/pc/1/5e-05")
    ]
    results = Results(study, tmp_path)
    results.write_header(commit="abc", versions={})
    finish(results, {"none": 50.0, "pc": 70.0})
    write_report(study, results)
    text = (results.folder / "report.md").read_text()
    assert "Complete: 4 runs.\n" in text and "Tuning" not in text and "rates tried" not in text
    assert "| tuning | none: optim_wrapper.optimizer.lr is 0.001, unless a variant sets it |" in text


def test_listed_commands_name_the_data(study_file, monkeypatch):
    """Also where an environment variable names them, which other machines do not have."""
    monkeypatch.setenv("FASHION_MNIST", "/some/data")
    command = run_command(load_study(study_file()), "gpu", Path("study.py"))
    assert command[2:] == [study_file(), "--size", "gpu", "--data", "/some/data", "--run"]


def test_pilot_runs_are_of_the_baseline(study_file):
    study = load_study(study_file())
    assert pilot_runs(study) == [RunId("pilot", "none", seed, 1e-3) for seed in (7, 8)]
    fixed = load_study(study_file(('none={"model', 'none={"optim_wrapper.optimizer.lr": 0.1, "model')))
    assert pilot_runs(fixed) == [RunId("pilot", "none", seed, 0.1) for seed in (7, 8)]
