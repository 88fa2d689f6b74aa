"""Settings of a study: what they mean, and those that are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from runs import error_lines

pytest.importorskip("mmpretrain")

from tiny_study import finish

import condattn.registry  # noqa: F401  registers the models
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.study import check
from condattn.openmmlab.study.check import check_checkpoints, check_metric, check_study
from condattn.openmmlab.study.plan import FINAL, RunId, load_study, pilot_runs, planned_runs
from condattn.openmmlab.study.report import write_report
from condattn.openmmlab.study.results import Results
from condattn.openmmlab.study.run import LOADERS, training_config
from condattn.openmmlab.study.schedule import run_command


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
        check_checkpoints(study, [5, 1], tmp_path)
    with pytest.raises(UserError, match=r"1.pth to start from \(2 seeds have none\); make each"):
        check_checkpoints(study, [1, 2], tmp_path)
    check_checkpoints(plain, [1], tmp_path)
    (tmp_path / "pretrained" / "1.pth").touch()
    check_checkpoints(study, [5, 1], tmp_path)
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
def test_a_study_that_cannot_run(study_file, study_images, change, message):
    root = Path(study_file(change)).parent
    with pytest.raises(UserError, match=message):
        check_study(load_study(study_file(change)), root, root)


def test_missing_data(study_file, monkeypatch, tmp_path):
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "nowhere"))
    with pytest.raises(
        UserError, match="no data for training, or too few: no train-images-idx3-ubyte.*the test writes them"
    ):
        check_study(load_study(study_file()), tmp_path, tmp_path)


def test_too_few_data(study_file, study_images, tmp_path):
    """mmengine's data sets index their samples with ``indices``."""
    study = load_study(study_file())

    def too_few(*arguments):
        raise IndexError("list index out of range")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="no data for training, or too few: Ind"):
        patch.setattr("mmengine.registry.DATASETS.build", too_few)
        check_study(study, tmp_path, tmp_path)


def test_the_hash_of_the_data_depends_on_the_content_of_label_maps(label_maps, study_file, tmp_path, monkeypatch):
    """Also if their sizes stay the same."""
    cfg, study = label_maps.cfg, load_study(study_file())
    cfg.val_dataloader = dict(dataset=dict(label_maps.dataset))
    for number, loader in enumerate(LOADERS):
        cfg[loader].dataset.indices = [2 * number, 2 * number + 1]
    monkeypatch.setattr(check, "_configs", lambda *arguments: {"none": cfg})
    path = label_maps.folder / "labels" / "4.png"
    first, content = check.data_hash(study, tmp_path, tmp_path), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    second = check.data_hash(study, tmp_path, tmp_path)
    assert len(first) == 32 and second[:16] == first[:16] and second[16:] != first[16:]
    path.write_bytes(content)
    assert check.data_hash(study, tmp_path, tmp_path) == first


def test_evaluators_whose_metrics_are_not_known_do_not_hide_the_others(study_file, tmp_path):
    study = load_study(study_file())
    cfg = training_config(study, RunId(FINAL, "pc", 1, 1e-3), tmp_path, tmp_path)
    cfg.val_evaluator = dict(type="SomeMetric")
    check_metric(study, cfg)
    with pytest.raises(UserError, match="no metric 'other'; the evaluators report accuracy/top1"):
        check_metric(replace(study, metric="other"), cfg)


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
