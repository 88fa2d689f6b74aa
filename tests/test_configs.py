"""Every config loads, builds and trains one step, and differs from its published reference only in the conditioning."""

import ast
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import mmdet
import mmseg
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

import condattn
from condattn.openmmlab.models.settings import module_settings

CONFIGS = Path(__file__).parents[1] / "configs"
UNREAD = ("_base_", "studies")  # base files, and studies, which tests/test_study_configs.py tests
OWN_DATA = ("coco.py", "png_labels.py")  # other files in own_data/ belong to the user
FILES = sorted(
    file
    for file in CONFIGS.rglob("*.py")
    if file.parent.name not in UNREAD and (file.parent.name != "own_data" or file.name in OWN_DATA)
)
NAMES = [str(file.relative_to(CONFIGS)) for file in FILES]
METHODS = {
    "pc": {"type": "RowPreconditioner", "detach": False},
    "sc": {"type": "SpectralCorrection", "strength": 1.0},
}
REFERENCES = {
    "mask_rcnn_swin_pc": (mmdet, "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"),
    "mask_rcnn_swin_sc": (mmdet, "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"),
    "mask_rcnn_swin_pc_3x": (mmdet, "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"),
    "mask_rcnn_swin_sc_3x": (mmdet, "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"),
    "mask_rcnn_swin-s_pc_3x": (mmdet, "swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py"),
    "mask_rcnn_swin-s_sc_3x": (mmdet, "swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py"),
    "retinanet_swin_pc": (mmdet, "swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"),
    "upernet_swin_pc": (mmseg, "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"),
    "upernet_swin_sc": (mmseg, "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"),
    "dino-4scale_r50_pc": (mmdet, "dino/dino-4scale_r50_8xb2-12e_coco.py"),
    "detr_r50_pc": (mmdet, "detr/detr_r50_8xb2-150e_coco.py"),
    "mask2former_swin_pc": (mmdet, "mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py"),
    "mask2former_swin_pc_ade20k": (mmseg, "mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py"),
    "upernet_deit-s_pc": (mmseg, "vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py"),
    "upernet_vit_pc": (mmseg, "vit/vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py"),
}
# Configs whose references mmdet and mmseg do not ship.
WITHOUT_REFERENCE = {
    *(
        "cascade_mask_rcnn_swin_pc",
        "mask_rcnn_swin-b_pc_3x",
        "mask_rcnn_swin-b_pc_3x_fsdp2",
        "mask_rcnn_swin-b_sc_3x",
        "mask_rcnn_davit-t_pc_3x",
    ),
    *("mask_rcnn_xcit-s_pc_3x", "mask_rcnn_xcit-s_sc_3x", "mask_rcnn_xcit-m_pc_3x", "mask_rcnn_xcit-m_sc_3x"),
    *("mask_rcnn_deit-s_pc_3x", "mask_rcnn_vit-b_pc_3x"),
    *("upernet_xcit-s_pc", "upernet_davit-t_pc"),
    *("segformer_xcit-s_pc", "segformer_davit-t_pc", "segformer_deit-s_pc"),
}
RECIPE = {
    *("model", "optim_wrapper", "param_scheduler", "train_cfg", "val_cfg", "test_cfg"),
    *("train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator"),
    *("tta_model", "tta_pipeline", "default_hooks", "log_processor", "env_cfg"),
}
DATA_ROOTS = {"data/coco", "data/ade/ADEChallengeData2016", "data/own"}
IMAGE_SIZE = (64, 96)
# The first self-attention of DETR's decoder attends to queries that are all equal; its weights may stay unchanged.
AT_REST = r"decoder\.layers\.0\.self_attn"


def load(name):
    return Config.fromfile(CONFIGS / name)


def scope(cfg):
    return DefaultScope.overwrite_default_scope(cfg.default_scope)


def dicts(node):
    """Yield every dict in `node`, including itself."""
    if isinstance(node, dict):
        yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
    for child in children:
        yield from dicts(child)


def shrink(cfg, depths=None):
    """Remove what a test cannot use: downloads, mixed precision without a GPU, thousands of proposals."""
    few = {"nms_pre": 50, "max_per_img": 20, "num": 16, "num_queries": 20, "num_points": 64}
    model = cfg.model
    for node in dicts(model):
        if (node.get("init_cfg") or {}).get("type") == "Pretrained":
            del node["init_cfg"]
        if node.get("pretrained"):
            node.pretrained = False
        node.update({key: min(few[key], node[key]) for key in few.keys() & node.keys()})
    for node in dicts(model.data_preprocessor):
        if "size" in node:
            node.size = IMAGE_SIZE
    if depths:
        cfg.model.backbone.depths = depths
    cfg.optim_wrapper.type = "OptimWrapper"
    return cfg


def build(cfg):
    with scope(cfg):
        model = MODELS.build(cfg.model)
        model.init_weights()
    return model.train()


def batch(cfg):
    """Make two random images with labels, as the toolbox's data loader passes them to the model."""
    classes = next(iter(class_counts(cfg)))
    sample = {"mmdet": detection_sample, "mmseg": segmentation_sample}[cfg.default_scope]
    samples = [sample(classes) for _ in range(2)]
    for item in samples:
        item.set_metainfo({"img_shape": IMAGE_SIZE, "ori_shape": IMAGE_SIZE})
    images = [torch.randint(256, (3, *IMAGE_SIZE), dtype=torch.uint8) for _ in samples]
    return {"inputs": images, "data_samples": samples}


def class_counts(cfg):
    """The numbers of classes that the heads of a model have."""
    keys = ("num_classes", "num_things_classes")
    return {node[key] for node in dicts(cfg.model) for key in keys if key in node}


def detection_sample(classes):
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [30.0, 10.0, 90.0, 60.0]])
    masks = np.zeros((len(boxes), *IMAGE_SIZE), dtype=np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    labels = torch.randint(classes, (len(boxes),))
    return DetDataSample(gt_instances=InstanceData(bboxes=boxes, labels=labels, masks=BitmapMasks(masks, *IMAGE_SIZE)))


def segmentation_sample(classes):
    return SegDataSample(gt_sem_seg=PixelData(data=torch.randint(classes, (1, *IMAGE_SIZE))))


def check_training(cfg):
    """Train one step from random weights; the loss is finite, and every attention weight changes."""
    model = build(cfg)
    weights = {
        name: (parameter, parameter.detach().clone())
        for name, parameter in model.named_parameters()
        if re.search(r"qkv\.weight|in_proj_weight|value_proj\.weight", name)
    }
    losses = model.train_step(batch(cfg), build_optim_wrapper(model, cfg.optim_wrapper))
    assert losses["loss"].isfinite()
    assert weights
    still = [name for name, (after, before) in weights.items() if torch.equal(after, before)]
    assert [name for name in still if not re.match(AT_REST, name)] == []
    return model


@pytest.mark.parametrize("name", NAMES)
def test_trains_one_step_as_its_name_promises(name):
    model = check_training(shrink(load(name), depths=[2, 2, 2, 2] if re.search("swin-[sb]", name) else None))
    promised = METHODS[re.search("_(pc|sc)", name).group(1) if "own_data" not in name else "pc"]
    if "xcit" in name and "strength" in promised:
        promised = {**promised, "strength": 10.0}
    sites = condattn.conditioning_of(model)
    assert sites
    for site, methods in sites.items():
        assert site.startswith("backbone.") or load(name).model.type == "Conditioned"
        assert [promised.items() <= method.items() for method in methods] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if re.search("swin-[sb]", name)])
def test_large_backbones_train_at_full_depth(name):
    cfg = shrink(load(name))
    model = check_training(cfg)
    assert len(condattn.conditioning_of(model)) == sum(cfg.model.backbone.depths) == 24


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("demo/")])
def test_datasets_build_and_lie_where_the_readme_says(name):
    cfg = load(name)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        dataset = next(node for node in dicts(loader.dataset) if "data_root" in node)
        assert any(f"{dataset.data_root.rstrip('/')}/".startswith(f"{root}/") for root in DATA_ROOTS)
        with scope(cfg):
            built = DATASETS.build({**dataset, "lazy_init": True})
        classes = len(built.metainfo["classes"])
        assert class_counts(cfg) == {classes}


@pytest.mark.parametrize("root", sorted(DATA_ROOTS - {"data/own"}))
def test_readme_documents_the_data_roots(root):
    assert root in (CONFIGS / "README.md").read_text()


def test_no_config_begins_with_an_import():
    """mmengine 0.10 takes such a config for a lazy one, which cannot inherit, where Python is not in /usr/lib."""
    importing = []
    for path in [*CONFIGS.rglob("*.py"), *CONFIGS.parent.glob("projects/*/configs/**/*.py")]:
        body = ast.parse(path.read_text()).body
        kinds = ["import" if isinstance(node, ast.Import | ast.ImportFrom) else ast.unparse(node)[:7] for node in body]
        if "import" in kinds:
            importing.append(path.name)
            assert "_base_ " in kinds[: kinds.index("import")], path
    assert set(importing) == {"coco.py", "swin_image_folder.py"}


def test_readme_lists_every_config():
    text = (CONFIGS / "README.md").read_text()
    assert [name for name in NAMES if not name.startswith("demo/") and f"({name})" not in text] == []


def effective(node):
    """Normalise `node` to compare effects: without defaults, None and scopes, and with file names instead of URLs."""
    if isinstance(node, dict):
        defaults = {"requires_grad": True}
        with MODELS.switch_scope_and_registry(None) as registry:
            cls = registry.get(node["type"]) if "type" in node else None
        for base in reversed(inspect.getmro(cls)) if inspect.isclass(cls) else ():
            for parameter in inspect.signature(base.__init__).parameters.values():
                defaults[parameter.name] = parameter.default
        settings = {key: effective(value) for key, value in node.items() if key != "_scope_" and value is not None}
        return {
            key: value for key, value in settings.items() if key not in defaults or value != effective(defaults[key])
        }
    if isinstance(node, (list, tuple)):
        return [effective(child) for child in node]
    if isinstance(node, str) and node.endswith(".pth"):
        return Path(node).name
    return node


def test_cascade_takes_from_its_reference_what_its_base_has_otherwise():
    cfg = load("cascade_mask_rcnn_swin_pc.py")
    assert cfg.model.backbone.drop_path_rate == 0.0
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].milestones) == (12, [8, 11])


def test_every_config_on_public_data_has_its_reference_named():
    assert REFERENCES.keys() | WITHOUT_REFERENCE == {file.stem for file in FILES if file.parent == CONFIGS}


@pytest.mark.parametrize("name", REFERENCES)
def test_is_its_published_reference_but_for_the_conditioning(name):
    toolbox, path = REFERENCES[name]
    ours, reference = load(f"{name}.py"), Config.fromfile(Path(toolbox.__file__).parent / ".mim/configs" / path)
    if ours.model.type == "Conditioned":
        ours.model = module_settings(ours.model)
    else:
        backbone = ours.model.backbone
        backbone.pop("conditioning", None)
        if backbone.type == "ConditionedTimmBackbone":  # timm's model of the same network; the rest is compared
            del reference.model.pretrained, reference.model["backbone"], ours.model["backbone"]
        else:
            assert backbone.type == f"Conditioned{reference.model.backbone.type}"
            backbone.type = reference.model.backbone.type
    if pretrained := reference.model.pop("pretrained", None):  # mmseg's older spelling of the backbone's init_cfg
        reference.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": pretrained}
    with scope(reference):
        for setting in RECIPE & reference.keys():
            assert effective(ours[setting]) == effective(reference[setting]), setting
        for setting in ("custom_hooks", "load_from", "resume", "runner_type", "randomness"):
            assert effective(ours.get(setting)) == effective(reference.get(setting)), setting
        scaling = reference.get("auto_scale_lr", {"enable": False, "base_batch_size": 16})
        assert ours.auto_scale_lr == scaling and not scaling.get("enable")  # tools/train.py --auto-scale-lr


@pytest.mark.parametrize("name", ["mask_rcnn_swin_pc.py", "mask_rcnn_swin_sc.py", "upernet_vit_pc.py"])
def test_conditioning_none_turns_a_config_into_its_baseline(name):
    cfg = shrink(load(name), depths=[1, 1, 1, 1] if "swin" in name else None)
    cfg.merge_from_dict({"model.backbone.conditioning": "none"})
    sites = condattn.conditioning_of(build(cfg))
    assert sites
    assert not any(sites.values())


@pytest.mark.parametrize("name", ["mask_rcnn_swin_pc.py", "upernet_swin_pc.py"])
def test_norms_and_positions_are_not_decayed(name):
    cfg = shrink(load(name), depths=[1, 1, 1, 1])
    model = build(cfg)
    decay = {
        id(parameter): group["weight_decay"]
        for group in build_optim_wrapper(model, cfg.optim_wrapper).param_groups
        for parameter in group["params"]
    }
    spared = re.compile(r"relative_position_bias_table|norm")
    for parameter_name, parameter in model.backbone.named_parameters():
        expected = 0.0 if spared.search(parameter_name) else cfg.optim_wrapper.optimizer.weight_decay
        assert decay[id(parameter)] == expected, parameter_name


COCO = [name for name in NAMES if "/" not in name and "data/coco" in str(load(name).train_dataloader)]


@pytest.mark.parametrize("base", COCO)
def test_own_coco_data_on_every_detector(base, tmp_path):
    """A user's copy of own_data/coco.py in which only the detector and the classes are changed."""
    cfg = own_coco(base, tmp_path)
    assert cfg.model == with_num_classes(load(base).model, 3)
    assert class_counts(cfg) == {3}
    for split, loader in {"train": cfg.train_dataloader, "val": cfg.val_dataloader}.items():
        assert loader.dataset.metainfo.classes == ["cat", "dog", "owl"]
        assert loader.dataset.ann_file == f"annotations/{split}.json"
    assert cfg.test_evaluator.ann_file == "data/own/annotations/val.json"
    masks = any(node.get("with_mask", False) for node in dicts(cfg.train_dataloader.dataset.pipeline))
    assert masks == ("segm" in cfg.val_evaluator.metric)
    assert cfg.train_cfg == {"type": "EpochBasedTrainLoop", "max_epochs": 24}
    assert cfg.log_processor.by_epoch and cfg.default_hooks.checkpoint.by_epoch


@pytest.mark.parametrize("base", ["mask2former_swin_pc.py", "detr_r50_pc.py", "dino-4scale_r50_pc.py"])
def test_own_coco_data_trains_heads_of_another_kind(base, tmp_path):
    check_training(shrink(own_coco(base, tmp_path)))


@pytest.mark.parametrize("template, rate", [("coco.py", 1e-4), ("png_labels.py", 6e-5)])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_the_rate_for_own_data_follows_the_batch_by_its_square_root(template, rate, batch_size, tmp_path):
    """``rate`` is that of a batch of 16."""
    text = (CONFIGS / "own_data" / template).read_text().replace('"../', f'"{CONFIGS}/')
    assert "batch_size = 4" in text
    (tmp_path / "mine.py").write_text(text.replace("batch_size = 4", f"batch_size = {batch_size}"))
    cfg = Config.fromfile(tmp_path / "mine.py")
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(rate * {1: 0.25, 4: 0.5, 16: 1.0}[batch_size])
    assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size == batch_size


def rates(cfg, batches):
    """Fraction of the configured learning rate in each iteration of a training with ``batches`` batches per epoch."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    defaults = dict(optimizer=optimizer, epoch_length=batches)
    schedulers = [PARAM_SCHEDULERS.build(scheduler, default_args=defaults) for scheduler in cfg.param_scheduler]
    found = []
    length = cfg.train_cfg.max_epochs * batches if "max_epochs" in cfg.train_cfg else cfg.train_cfg.max_iters
    for iteration in range(1, length + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or iteration % batches == 0:
                scheduler.step()
    return found


@pytest.mark.parametrize("epochs", [1, 2, 3, 24, 50])
def test_own_coco_data_reaches_its_rate_in_every_length(epochs, tmp_path):
    cfg = own_coco("mask_rcnn_swin_pc.py", tmp_path, max_epochs=epochs)
    for batches in (1, 2, 3, 24, 49):
        found = rates(cfg, batches)
        warm_up = max(round(min(1, epochs / 24) * batches), 1)
        assert found[0] == pytest.approx(0.01 if warm_up > 1 else 1)
        assert found[warm_up - 1] == pytest.approx(1)
        assert found[-1] == pytest.approx({1: 1, 2: 0.1, 3: 0.1}.get(epochs, 0.01))


@pytest.mark.parametrize("length", [1, 9, 10, 39, 40, 79, 80, 8000])
def test_own_label_maps_reach_their_rate_in_every_length(length, tmp_path):
    text = (CONFIGS / "own_data/png_labels.py").read_text().replace('"../', f'"{CONFIGS}/')
    (tmp_path / "mine.py").write_text(text.replace("max_iters = 8000", f"max_iters = {length}"))
    cfg = Config.fromfile(tmp_path / "mine.py")
    found = rates(cfg, batches=7)
    assert found[0] == pytest.approx(0.01 if length >= 80 else 1)
    assert found[length // 40 - 1 if length >= 80 else 0] == pytest.approx(1)
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == max(length // 10, 1)


def own_coco(base, folder, max_epochs=24):
    text = (CONFIGS / "own_data/coco.py").read_text()
    text = text.replace("../mask_rcnn_swin_pc.py", str(CONFIGS / base)).replace('"dog"]', '"dog", "owl"]')
    text = text.replace("max_epochs = 24", f"max_epochs = {max_epochs}")
    (folder / "mine.py").write_text(text)
    return Config.fromfile(folder / "mine.py")


def with_num_classes(node, count):
    for child in dicts(node):
        for key in ("num_classes", "num_things_classes"):
            if key in child:
                child[key] = count
        if isinstance(child.get("class_weight"), list):
            child["class_weight"] = [1.0] * count + [0.1]
    return node


TIMM = {
    str(backbone): backbone for name in NAMES if (backbone := load(name).model.get("backbone", {})).get("pretrained")
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", TIMM.values(), ids=lambda settings: settings.model_name)
def test_weights_of_timm_fit(settings, tmp_path):
    """The weights that timm's model of that name would download fit the backbone of the config."""
    settings = settings.to_dict()
    pretrained = timm.create_model(settings["model_name"])
    torch.save(pretrained.state_dict(), tmp_path / "weights.pth")
    backbone = MODELS.build(settings | dict(pretrained=False, checkpoint_path=str(tmp_path / "weights.pth")))
    backbone.init_weights()
    weights = pretrained.state_dict()
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("name", ["cascade_mask_rcnn_swin_pc.py", "own_data/coco.py", "own_data/png_labels.py"])
def test_the_config_that_a_run_writes_is_the_one_that_it_was_given(name, tmp_path):
    cfg = load(name)
    cfg.dump(tmp_path / "dumped.py")
    assert Config.fromfile(tmp_path / "dumped.py").to_dict() == cfg.to_dict()
