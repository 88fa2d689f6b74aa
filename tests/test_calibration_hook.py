"""Calibration before the first iteration: on batches as the training has them, of all kinds of models."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner.priority import get_priority
from mmengine.structures import InstanceData, PixelData
from runs import CONFIGS
from torch import nn
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.engine.hooks import MeanTeacherHook
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmseg.structures import SegDataSample
from whole_models import NAMES, small

import condattn
import condattn.registry
from condattn.openmmlab.hooks import calibration
from condattn.openmmlab.hooks.calibration import CalibrationHook
from condattn.openmmlab.hooks.spectra import SpectraHook
from condattn.openmmlab.models.forward import forward
from condattn.openmmlab.runner.launch import build_model, load_config
from condattn.openmmlab.runner.rewriting import write_checkpoint

SIZES = ((64, 48), (40, 64))


def build(cfg, tmp_path):
    """Build the model of a configuration, with random weights."""
    cfg.dump(tmp_path / "config.py")
    model = build_model(load_config(str(tmp_path / "config.py")))
    model.init_weights()
    return model.train()


def detections(height, width, objects):
    boxes = torch.tensor([[4.0, 6.0, 20.0, 30.0], [10.0, 10.0, 30.0, 25.0]])[:objects]
    masks = np.zeros((objects, height, width), dtype=np.uint8)
    masks[:, 8:20, 8:20] = 1
    instances = InstanceData(bboxes=boxes, labels=torch.arange(objects), masks=BitmapMasks(masks, height, width))
    return DetDataSample(gt_instances=instances)


def label_map(height, width, objects):
    return SegDataSample(gt_sem_seg=PixelData(data=torch.randint(objects, (1, height, width))))


def batch(scope, sizes=SIZES):
    """A batch of images of different sizes, with different numbers of objects, as a data loader of the scope has it."""
    make = {"mmdet": detections, "mmseg": label_map}[scope]
    samples = [make(*size, objects) for objects, size in enumerate(sizes, 1)]
    for sample, size in zip(samples, sizes, strict=True):
        sample.set_metainfo({"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    return {"inputs": images, "data_samples": samples}


def calibrate(model, batches, loaded=None, iteration=0):
    """Run the hook, after it has seen the checkpoint ``loaded``, and return what it logs."""
    lines = []
    logger = SimpleNamespace(info=lambda line: lines.append(str(line)))
    loader = DataLoader(batches, collate_fn=lambda items: items[0])
    runner = SimpleNamespace(iter=iteration, model=model, train_dataloader=loader, logger=logger, seed=0)
    hook = CalibrationHook(batches=len(batches))
    if loaded is not None:
        hook.after_load_checkpoint(runner, loaded)
    hook.before_train(runner)
    return lines


@pytest.mark.parametrize("name", NAMES)
def test_whole_models_are_calibrated(name, tmp_path):
    cfg = small(name)
    model, batches = build(cfg, tmp_path), [batch(cfg.default_scope)]
    state = torch.get_rng_state()
    lines = calibrate(model, batches)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert any("relative error of the output" in line for line in lines)
    assert not any("no input reached it" in line for line in lines)


def test_crops_of_different_sizes(tmp_path):
    cfg = Config.fromfile(CONFIGS / "demo/upernet_swin_pc.py")
    cfg.model.data_preprocessor.size = (64, 64)
    model = build(cfg, tmp_path)
    lines = calibrate(model, [batch("mmseg"), batch("mmseg", SIZES[::-1])])
    assert len(lines) == 8 and all("relative error of the output" in line for line in lines)


def test_both_passes_see_the_same_images(tmp_path, monkeypatch):
    """Images are scaled at random by a data preprocessor, once."""
    cfg = Config.fromfile(CONFIGS / "demo/upernet_swin_pc.py")
    cfg.model.data_preprocessor.size = (64, 64)
    model = build(cfg, tmp_path)
    prepare, seen = type(model.data_preprocessor).forward, []

    def scaled(self, data, training=False):
        data = prepare(self, data, training)
        return {**data, "inputs": data["inputs"] * torch.rand(())}

    monkeypatch.setattr(type(model.data_preprocessor), "forward", scaled)
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    calibrate(model, [batch("mmseg"), batch("mmseg")])
    assert len(seen) == 4 and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    "start, trained_with",
    [(start, method) for start in ("load_from", "init_cfg", "init_cfg of the model") for method in ("pc", "sc+pc")]
    + [("load_from", "none"), ("init_cfg", "none")],
)
def test_weights_that_were_trained_with_a_preconditioner_are_left_alone(start, trained_with, tmp_path):
    cfg = Config.fromfile(CONFIGS / "demo/upernet_swin_pc.py")
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.model.backbone.conditioning = trained_with
    model = build(cfg, tmp_path)
    write_checkpoint(tmp_path / "model.pth", model, {})
    write_checkpoint(tmp_path / "backbone.pth", model.backbone, {})
    cfg.model.backbone.conditioning = "pc" if trained_with == "none" else trained_with
    if start == "init_cfg":
        cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "backbone.pth"))
    elif start != "load_from":
        cfg.model.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "model.pth"))
    model = build(cfg, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = torch.load(tmp_path / "model.pth", weights_only=False) if start == "load_from" else None
    lines = calibrate(model, [batch("mmseg")], loaded)
    changed = any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert changed == (trained_with == "none")
    if changed:
        assert len(lines) == 8
    else:
        assert lines == ["CalibrationHook leaves weights alone that were trained with RowPreconditioner"]


def test_a_resumed_run_is_left_alone(tmp_path):
    """It has been calibrated before its first iteration, and trained since."""
    cfg = Config.fromfile(CONFIGS / "demo/upernet_swin_pc.py")
    cfg.model.data_preprocessor.size = (64, 64)
    model = build(cfg, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert calibrate(model, [batch("mmseg")], iteration=5) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(calibrate(model, [batch("mmseg")])) == 8


def test_all_processes_use_the_mean_of_their_row_norms(monkeypatch):
    """The other one of two processes measures norms that are three times as large."""

    def all_reduce(value, op):
        other = torch.cat([3 * value[:-1], value[-1:]])  # sums of norms, and their number
        value.copy_({"mean": (value + other) / 2}[op])

    data = [{"inputs": torch.randn(4, 3, 32, 32)}]
    models = Classifier(), Classifier()
    calibrate(models[0], data)
    monkeypatch.setattr(calibration, "dist", SimpleNamespace(all_reduce=all_reduce))
    calibrate(models[1], data)
    for alone, together, initial in zip(*(m.backbone.blocks for m in (*models, Classifier())), strict=True):
        torch.testing.assert_close(together.attn.proj.weight, 2 * alone.attn.proj.weight)
        assert not torch.allclose(alone.attn.proj.weight, initial.attn.proj.weight)


def measured(model, data, **settings):
    """Run the other hook, and return what it logs: names of scalars, and warnings."""
    scalars, warnings = {}, []
    logger = SimpleNamespace(warning=warnings.append)
    visualizer = SimpleNamespace(add_scalars=lambda values, step: scalars.update(values))
    runner = SimpleNamespace(iter=0, max_iters=1000, model=model, logger=logger, visualizer=visualizer)
    SpectraHook(max_sites=2, **settings).after_train_iter(runner, 0, data)
    return scalars, warnings


def test_a_semi_supervised_model(tmp_path):
    """Its student runs on images with annotations, before its weights are copied to the teacher."""
    cfg = small("mask_rcnn_swin_pc")
    branches = dict(type="MultiBranchDataPreprocessor", data_preprocessor=cfg.model.data_preprocessor)
    cfg.model = dict(type="SoftTeacher", detector=cfg.model, semi_train_cfg={}, data_preprocessor=branches)
    model, both = build(cfg, tmp_path), batch("mmdet")
    data = {
        key: dict(unsup_teacher=[None, values[1]], sup=[values[0], None], unsup_student=[None, values[1]])
        for key, values in both.items()
    }
    seen = []
    model.student.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    teacher = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    lines = calibrate(model, [data])
    assert lines and all("relative error of the output" in line for line in lines)
    assert set(seen) == {(1, 3, 64, 64)}
    assert all(torch.equal(value, teacher[name]) for name, value in model.teacher.state_dict().items())
    changed = [name for name, value in model.student.state_dict().items() if not torch.equal(value, teacher[name])]
    assert any("proj.weight" in name for name in changed)
    assert get_priority(CalibrationHook.priority) < get_priority(MeanTeacherHook.priority)
    scalars, warnings = measured(model, data)
    assert scalars and not warnings
    without = {key: dict(values, sup=[None, None]) for key, values in data.items()}
    assert measured(model, without)[0]


def test_spectra_of_crops_of_different_sizes(tmp_path):
    cfg = Config.fromfile(CONFIGS / "demo/upernet_swin_pc.py")
    scalars, warnings = measured(build(cfg, tmp_path), batch("mmseg"), images=2)
    assert scalars and not warnings


def test_a_cascade_whose_second_head_needs_points(tmp_path):
    cfg = Config.fromfile(CONFIGS / "demo/upernet_swin_pc.py")
    head = cfg.model.decode_head
    points = dict(type="PointHead", in_channels=head.in_channels[:1], in_index=[0], channels=8, num_fcs=1)
    points.update(num_classes=head.num_classes, coarse_pred_each_layer=True, dropout_ratio=0)
    cfg.model.update(type="CascadeEncoderDecoder", num_stages=2, decode_head=[head, points])
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.model.test_cfg = dict(mode="whole", subdivision_steps=1, subdivision_num_points=4, scale_factor=2)
    assert len(calibrate(build(cfg, tmp_path), [batch("mmseg")])) == 8


@pytest.mark.parametrize("part, expected", [("language_model", "predict"), ("backbone", "tensor")])
def test_detectors_that_read_text_have_no_other_mode(part, expected):
    class Detector(nn.Module):
        def forward(self, inputs, mode):
            modes.append(mode)

    modes, model = [], Detector()
    model.add_module(part, nn.Identity())
    forward(model, {"inputs": None})
    assert modes == [expected]


@pytest.mark.parametrize("name", NAMES)
def test_spectra_of_whole_models_are_measured(name, tmp_path):
    cfg = small(name)
    scalars, warnings = measured(build(cfg, tmp_path), batch(cfg.default_scope))
    assert scalars and not any("measures no more" in line for line in warnings)


def test_a_checkpoint_replaces_the_weights_that_the_model_was_built_with(tmp_path):
    """Its record decides, also if it has none."""
    cfg = Config.fromfile(CONFIGS / "demo/upernet_swin_pc.py")
    cfg.model.data_preprocessor.size = (64, 64)
    write_checkpoint(tmp_path / "backbone.pth", build(cfg, tmp_path).backbone, {})
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "backbone.pth"))
    assert len(calibrate(build(cfg, tmp_path), [batch("mmseg")], {"state_dict": {}})) == 8


class RandomImages(Dataset):
    """Images with an index and random numbers from all generators that augmentations use."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        numbers = index + torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        return {"inputs": numbers.reshape(3, 1, 1).expand(3, 32, 32).float()}


class Classifier(BaseModel):
    """Minimises its outputs, and keeps the batches that it was trained with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = pytest.importorskip("timm").create_model("test_vit", img_size=32)
        condattn.condition(self.backbone, "pc")
        self.batches = []

    def forward(self, inputs, data_samples=None, mode="tensor"):
        inputs = torch.stack(list(inputs))
        if mode == "loss":
            self.batches.append(inputs[:, :, 0, 0])
            return {"loss": self.backbone(inputs).square().mean()}
        return self.backbone(inputs)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("sampler", ["InfiniteSampler", "DefaultSampler"])
def test_the_training_sees_the_same_batches(sampler, exact, workers, tmp_path, monkeypatch):
    """As many iterations as without the hook, with the same images and augmentations."""
    trained, calls, real = [], [], calibration.calibrate
    monkeypatch.setattr(calibration, "calibrate", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    for hooks in ([], [dict(type="CalibrationHook", batches=3)]):
        in_epochs = (
            dict(by_epoch=True, max_epochs=2) if sampler == "DefaultSampler" else dict(by_epoch=False, max_iters=8)
        )
        runner = Runner(
            Classifier(),
            str(tmp_path / str(len(trained))),
            train_dataloader=dict(
                dataset=RandomImages(),
                sampler=dict(type=sampler),
                batch_size=4,
                num_workers=workers,
                persistent_workers=workers > 0,
            ),
            train_cfg=in_epochs,
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=1e-3)),
            custom_hooks=[*hooks, *([dict(type="ExactResumeHook")] if exact else [])],
            experiment_name=f"{tmp_path.name} {len(trained)}",
            randomness=dict(seed=3),
        )
        model = runner.train()
        trained.append(torch.stack(model.batches))
    assert trained[0].shape == (10 if sampler == "DefaultSampler" else 8, 4, 3)
    assert torch.equal(*trained)
    assert len(calls) == 1


def test_a_calibration_on_no_batch():
    with pytest.raises(ValueError, match="CalibrationHook: batches is 0; expected at least 1"):
        CalibrationHook(batches=0)
