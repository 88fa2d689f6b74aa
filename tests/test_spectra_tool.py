"""Measurements of attention in the report, in the tool, and in the log of a training."""

import csv
import json
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
from runs import CONFIGS, DEMO, ROOT, TOOLS, run
from torch import nn

import condattn
from condattn.openmmlab.models.loading import record_of
from condattn.spectra import Measurement, measure
from condattn.spectra.report import plot_entropy, write_report


def test_the_report(tmp_path):
    timm = pytest.importorskip("timm")
    measurements = {}
    for label in ("none", "pc", "sc(strength=10.0)+pc"):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", img_size=64)
        condattn.condition(model, label)
        measurements[label] = measure(model, torch.randn(1, 3, 64, 64))
    paths = write_report(measurements, tmp_path / "out", "A <title>")
    assert {path.name for path in paths} == {
        *("spectra.csv", "spectra.json", "report.html"),
        *("kappa_by_depth.png", "heads.png", "singular_values.png", "entropy_by_depth.png"),
    }
    rows = json.loads((tmp_path / "out" / "spectra.json").read_text())
    with (tmp_path / "out" / "spectra.csv").open() as file:
        assert [row["kappa"] for row in csv.DictReader(file)] == [
            str(row["kappa"]) if "kappa" in row else "" for row in rows
        ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "http" not in page and "A &lt;title&gt;" in page
    assert "attention is saturated" in page and page.count("blocks.5.attn") >= 3


def test_the_plot_of_the_entropy_has_all_image_sizes():
    """Of a model with one site, whose entropies are kept apart by the number of keys."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", img_size=64, dynamic_img_size=True, depth=1).eval()
    images = [torch.randn(1, 3, size, size) for size in (64, 96)]
    both, *single = (measure(model, inputs, ["entropy"]) for inputs in (images, *([one] for one in images)))
    assert len(both.entropies) == 2
    (line, *_) = plot_entropy({"none": both}).axes[0].lines
    values = [value for m in single for one in m.entropies for value in one.relative.flatten().tolist()]
    assert line.get_ydata().item() == pytest.approx(statistics.median(values))


def spectra_tool(call, *arguments):
    pytest.importorskip("mmdet")
    return call("analysis/spectra", *arguments)


def test_the_tool_compares_conditionings(call, detection, scenes, tmp_path):
    images = scenes / "images" / "validation"
    names = ("none", "sc(strength=10.0,relative=False)+pc")
    command = [detection.config, detection.checkpoint, "--images", images, "--num", 1, "--compare", ",".join(names)]
    status, output, _ = spectra_tool(call, *command, "--out", "out")
    assert status is None and "saturated" in output and "report.html" in output
    rows = json.loads((tmp_path / "out" / "spectra.json").read_text())
    assert {row["model"] for row in rows} == set(names)
    first, second = ([r["sigma_max"] for r in rows if r["model"] == m and r["quantity"] == "W_Q"] for m in names)
    assert first == second  # the same weights


def test_the_tool_measures_weights_alone_and_data_of_a_configuration(call, segmentation_options, tmp_path):
    config = DEMO / "upernet_swin_pc.py"
    status, output, _ = spectra_tool(call, config, "--out", "weights")
    assert status is None and "kappa_by_depth.png" in output and "entropy" not in "".join(output.split()[-6:])
    options = ["--cfg-options", *segmentation_options]
    status, output, _ = spectra_tool(call, config, "--dataset", "val", "--num", 1, "--out", "data", *options)
    assert status is None and (tmp_path / "data" / "entropy_by_depth.png").exists()


def test_the_tool_takes_models_of_timm(call, scenes):
    pytest.importorskip("timm")
    images = scenes / "images" / "validation"
    options = ("--images", images, "--num", 1, "--jacobian", "--sites", 2, "--out", "out")
    status, output, _ = spectra_tool(call, "test_vit", *options)
    assert status is None and "blocks.3.attn" in output and "blocks.5.attn" not in output
    assert "Jacobian" in output and "bound" in output and "jacobians.png" in output


def test_only_trained_weights_judge_the_preconditioner(call, monkeypatch, detection, tmp_path):
    """In the output and in the report, which names the weights."""
    timm = pytest.importorskip("timm")
    weights = timm.create_model("test_vit").state_dict()
    monkeypatch.setattr("condattn.openmmlab.models.timm.pretrained_weights", lambda name: weights)
    judged = []
    for module in ("advice", "report"):
        monkeypatch.setattr(
            f"condattn.spectra.{module}.find_warnings", lambda measurements, trained: judged.append(trained) or []
        )
    torch.save(weights, "weights.pth")
    for arguments, title in (
        (["test_vit"], "initial weights"),
        (["test_vit", "--pretrained"], "timm&#39;s pretrained weights"),
        (["test_vit", "weights.pth"], "weights.pth"),
        ([detection.config], "initial weights"),
    ):
        spectra_tool(call, *arguments, "--out", "out")
        assert f", {title}</h1>" in (tmp_path / "out" / "report.html").read_text()
    assert judged == [False] * 2 + [True] * 4 + [False] * 2


def test_the_tool_takes_weights_of_timm(call, monkeypatch, tmp_path):
    timm = pytest.importorskip("timm")
    weights = timm.create_model("test_vit").state_dict()
    monkeypatch.setattr("condattn.openmmlab.models.timm.pretrained_weights", lambda name: weights)
    status, output, _ = spectra_tool(call, "test_vit", "--pretrained", "--out", "out")
    assert status is None and "timm's test_vit" in output
    rows = json.loads((tmp_path / "out" / "spectra.json").read_text())
    heads = weights["blocks.0.attn.qkv.weight"][:64].unflatten(0, (2, -1))
    wanted = torch.linalg.svdvals(heads)[:, 0].tolist()
    found = [row["sigma_max"] for row in rows if (row["site"], row["quantity"]) == ("blocks.0.attn", "W_Q")]
    assert found == pytest.approx(wanted)


def test_the_tool_refuses_bad_input(refuse, detection, scenes, tmp_path):
    images = scenes / "images" / "validation"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    tool = "analysis/spectra"
    for out in ("file", "file/new", "/proc/new/new"):
        refuse(tool, detection.config, "--out", out, parts=(f"--out: the folder {out} cannot be written (",))
    refuse(tool, "test_vit", "--out", "out", "--dataset", "val", parts=("--dataset expects a configuration",))
    coco, parts = CONFIGS / "mask_rcnn_swin_pc.py", ("--dataset val: no data at data/coco/", "or give --images FOLDER")
    refuse(tool, coco, "--out", "new/out", "--dataset", "val", parts=parts)
    refuse(tool, "no_model", "--out", "out", parts=("no_model", "timm"))
    refuse(tool, detection.config, "--out", "out", "--images", "empty", parts=("no image below empty",))
    refuse(tool, detection.config, "--out", "out", "--jacobian", parts=("--jacobian expects images",))
    refuse(tool, detection.config, "--out", "out", "--pretrained", parts=("--pretrained is for",))
    refuse(tool, detection.config, "--out", "out", "--num", "0", parts=("--num", "at least 1"))
    torch.save({"state_dict": {"a.weight": torch.ones(2)}}, "other.pth")
    refuse(tool, detection.config, "other.pth", "--out", "out", parts=("no weight of the checkpoint other.pth fits",))
    checkpoint = torch.load(detection.checkpoint, weights_only=False)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("qkv.weight"))
    checkpoint["state_dict"][name][0, 0] = torch.nan
    torch.save(checkpoint, "nan.pth")
    refuse(
        tool, detection.config, "nan.pth", "--out", "out", parts=("nan.pth", "values that are not finite", "qkv.weight")
    )
    refuse(
        *(tool, detection.config, detection.checkpoint, "--images", images, "--out", "out"),
        *("--compare", "none,colour", "--num", "1"),
        parts=("unknown conditioning 'colour'",),
    )


LISTOPS = ROOT / "projects" / "long_range_arena" / "configs" / "listops_small.py"


def test_weights_of_a_model_that_takes_no_image_files(call):
    status, output, _ = spectra_tool(call, LISTOPS, "--out", "weights")
    assert status is None and "kappa_by_depth.png" in output


@pytest.mark.parametrize("tool", ["analysis/spectra", "checkpoints/calibrate", "checkpoints/fold", "predict"])
def test_images_for_a_configuration_that_does_not_prepare_them(tool, refuse, scenes, tmp_path):
    """Nothing is built and nothing is written before it is said."""
    pytest.importorskip("mmpretrain")
    images, weights = scenes / "images" / "validation", tmp_path / "plain.pth"
    torch.save({"state_dict": {"a": torch.ones(1)}}, weights)
    idx = ROOT / "projects" / "pretraining" / "configs" / "swin_fashion_mnist.py"

    def command(config):
        if tool == "predict":
            return [tool, images, config, weights, "--out-dir", "out"]
        return [tool, config, weights, "--images", images, "--out", "out"]

    none = ["--cfg-options", "test_dataloader=None"]
    refuse(*command(DEMO / "mask_rcnn_swin_pc.py"), *none, parts=("mask_rcnn_swin_pc.py has no test_dataloader",))
    if tool != "predict":  # which says that it is for detectors and segmenters
        for config, found in ((LISTOPS, "found none"), (idx, "found 'NumpyToPIL', ")):
            refuse(*command(config), parts=(f"{config}: expected a test pipeline that loads image files", found))


def test_data_without_image_files(refuse, tmp_path):
    config = tmp_path / "other.py"
    one = [0, 0, 0, 1]  # image, row, column, label
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, *one, *one, *one, 7]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, *one, 0]))
    data = f"dict(_delete_=True, type='IdxImages', data_root='{tmp_path}', split='test')"
    base = f"_base_ = '{DEMO}/upernet_swin_pc.py'"
    for value, part in (("None", "has no val_dataloader"), (f"dict(dataset={data})", "IdxImages has no image files")):
        config.write_text(f"{base}\nval_dataloader = {value}")
        refuse("analysis/spectra", config, "--dataset", "val", "--out", "out", parts=("--dataset val: ", part))


@pytest.mark.parametrize("name", ["test_dataloader", "test_evaluator", "test_cfg"])
def test_an_evaluation_of_a_configuration_without_it(name, refuse, detection):
    parts = (f"settings that an evaluation needs are missing: {name}",)
    refuse("test", detection.config, detection.checkpoint, "--cfg-options", f"{name}=None", parts=parts)


def test_a_hook_logs_while_a_model_trains_and_changes_nothing(segmentation, tmp_path):
    """The demo's training with the hook equals that without it."""
    settings = [*segmentation.options, "custom_hooks=[]"]
    run(TOOLS / "train.py", segmentation.config, "--work-dir", "plain", "--cfg-options", *settings, cwd=tmp_path)
    plain, watched = (
        torch.load(file, weights_only=False)["state_dict"]
        for file in (tmp_path / "plain/iter_2.pth", segmentation.checkpoint)
    )
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    (file,) = segmentation.work_dir.glob("*/vis_data/scalars.json")
    logged = [json.loads(line) for line in file.read_text().splitlines()]
    (logged,) = [line for line in logged if any(name.startswith("spectra/") for name in line)]
    names = {name.rpartition("/")[2] for name in logged} - {"step"}
    assert logged["step"] == 1
    matrices = ("W_Q", "W_K", "W_V", "AX", "CAX")
    assert {"entropy", "largest_logit", *(f"{of}_{m}" for of in ("kappa", "sigma_min") for m in matrices)} == names
    assert len({name.split("/")[1] for name in logged if "/" in name}) == 6
    assert re.search(r"SpectraHook took [\d.]+ s, [\d.]+% of the training", segmentation.output)


@pytest.mark.parametrize("setting", ["interval", "max_sites", "images"])
def test_settings_of_the_hook(setting):
    pytest.importorskip("mmengine")
    from condattn.openmmlab.hooks.spectra import SpectraHook

    with pytest.raises(ValueError, match=f"SpectraHook: {setting} is 0"):
        SpectraHook(**{setting: 0})


def test_what_cannot_be_measured_does_not_end_a_training():
    pytest.importorskip("mmengine")
    from condattn.openmmlab.hooks.spectra import SpectraHook

    warnings = []
    logger = SimpleNamespace(warning=warnings.append)
    runner = SimpleNamespace(iter=0, model=nn.MultiheadAttention(12, 3), logger=logger)
    hook = SpectraHook()
    for _ in range(2):
        hook.after_train_iter(runner, 0, {"inputs": {"labelled": 1}})
    (line,) = warnings
    assert line.startswith("SpectraHook measures no more in this run: ")


def test_only_the_last_measurement_of_a_training_judges_the_preconditioner(monkeypatch):
    pytest.importorskip("mmengine")
    from condattn.openmmlab.hooks import spectra

    judged = []
    for name, function in dict(
        unwrapped=lambda model: model,
        find_sites=lambda model: [],
        measure=lambda *arguments, **settings: Measurement({}),
        find_warnings=lambda measurements, trained: judged.append(trained) or [],
    ).items():
        monkeypatch.setattr(spectra, name, function)
    runner = SimpleNamespace(model=None, max_iters=10, visualizer=SimpleNamespace(add_scalars=lambda *_, **__: None))
    for runner.iter in (0, 3, 7):
        spectra.SpectraHook(interval=4)._measure(runner, {"inputs": []})
    assert judged == [False, False, True]


def test_weights_of_a_conditioned_model_of_timm(refuse, call, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit")
    condattn.condition(model, "sc")
    torch.save({"state_dict": model.state_dict(), "meta": {"conditioning": record_of(model)}}, tmp_path / "sc.pth")
    command = ["analysis/spectra", "test_vit", "sc.pth", "--out", "out"]
    refuse(*command, parts=("sc.pth is of a model with conditioning='sc'", "--compare"))
    for option in (["--compare", "none,sc"], ["--other-conditioning"]):
        status, _, errors = call(*command, *option)
        assert status is None, errors
