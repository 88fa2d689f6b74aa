"""The data check: faults in the settings of data sets, heads and evaluators."""

import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from data_sets import HEIGHT, WIDTH, rotated
from runs import CONFIGS

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset, CocoPanopticDataset
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.datasets.transforms import LoadAnnotations

from condattn.openmmlab.data_check.check import AS_ANNOTATED, _kind, adapt, find
from condattn.openmmlab.data_check.heads import check_heads
from condattn.openmmlab.data_check.page import write_page
from condattn.openmmlab.data_check.settings import leaves, named_paths
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.runner.launch import load_config


def test_classes_in_a_string(coco):
    coco.cfg.train_dataloader.dataset.metainfo.classes = "cat"
    (error,) = coco.check().errors
    assert "write classes = ('cat',)" in error


def test_a_data_set_that_nobody_has_registered(coco):
    coco.cfg.train_dataloader.dataset.type = "CocoDatasett"
    (error,) = coco.check().errors
    assert "no data set CocoDatasett is registered" in error


class Fixed(CocoDataset):
    """Takes its folder alone, and reads its files when it is built."""

    def __init__(self, folder, pipeline, test_mode=False):
        super().__init__(
            ann_file=f"{folder}/annotations.json",
            data_prefix=dict(img=f"{folder}/images"),
            metainfo=dict(classes=("cat", "dog")),
            indices=[0, 1],
            pipeline=pipeline,
            test_mode=test_mode,
        )


class Prepared(CocoDataset):
    """Has its own pipeline, and settings that a configuration cannot replace."""

    def __init__(self, **settings):
        filters = dict(filter_empty_gt=True, min_size=32)
        super().__init__(ann_file="annotations.json", pipeline=[], filter_cfg=filters, **settings)


@pytest.fixture
def fixed(coco):
    pipeline = coco.cfg.train_dataloader.dataset.pipeline
    coco.cfg.train_dataloader.dataset = dict(type=Fixed, folder=str(coco.folder), pipeline=pipeline)
    return coco


@pytest.fixture
def prepared(coco):
    leaf = coco.cfg.train_dataloader.dataset
    leaf.type = Prepared
    for name in ("ann_file", "pipeline", "filter_cfg"):
        del leaf[name]
    return coco


def test_a_class_with_arguments_of_its_own(fixed, capsys):
    findings = fixed.check()
    assert findings.errors == []
    assert findings.summary.startswith("2 of 6 images")
    assert capsys.readouterr().out == ""
    fixed.cfg.train_dataloader.dataset["colour"] = "red"
    assert "the data set Fixed cannot be built" in fixed.check().errors[0]


def test_a_class_that_reads_a_damaged_file_when_it_is_built(fixed):
    del fixed.content["annotations"][0]["area"]
    fixed.write()
    (error,) = fixed.check().errors
    assert error.endswith("cannot be built: KeyError: 'area'; correct its settings, or the files that it reads")


def test_a_class_with_settings_of_its_own(prepared):
    prepared.content["images"][0]["width"] = 8
    prepared.write()
    findings = prepared.check()
    assert "1 image smaller than 32 pixels left out" in findings.summary
    assert findings.errors == []


def test_a_class_with_a_pipeline_of_its_own_has_pictures(prepared):
    object.__setattr__(prepared.cfg, "_filename", "config.py")
    write_page(prepared.cfg, find(prepared.cfg, "train"), prepared.folder / "page")
    assert len(list(prepared.folder.glob("page/train_*.png"))) >= 4


def test_a_file_that_the_class_names_is_not_repaired(prepared):
    del prepared.content["annotations"][0]["area"]
    prepared.write()
    findings = prepared.check()
    (error,) = findings.errors
    assert "the area of 1 object was filled in" in error
    assert "because the class of the data set names the file; repair it, or replace it by the copy" in error
    assert findings.ann_file == ""


class Folded(CocoDataset):
    """Has its annotation files in one folder."""

    def __init__(self, ann_file, **settings):
        super().__init__(ann_file=f"files/{ann_file}", **settings)


def test_a_file_to_which_the_class_adds_a_folder_is_not_repaired(coco):
    coco.cfg.train_dataloader.dataset.type = Folded
    del coco.content["annotations"][0]["area"]
    (coco.folder / "files").mkdir()
    (coco.folder / "files" / "annotations.json").write_text(json.dumps(coco.content))
    (error,) = coco.check().errors
    assert "repair it, or replace it by the copy" in error


def test_heads_with_another_number_of_classes(coco):
    coco.cfg.model = dict(rpn_head=dict(num_classes=1), roi_head=dict(bbox_head=[dict(num_classes=80)]))
    (error,) = coco.check().errors
    assert error.startswith("model.roi_head.bbox_head.0.num_classes is 80, but the data have 2 classes ('cat', 'dog')")


def things(number: int, stuff: int, **settings) -> dict:
    return dict(type="Mask2FormerHead", num_things_classes=number, num_stuff_classes=stuff, **settings)


@pytest.mark.parametrize("part", ["panoptic_head", "panoptic_fusion_head", "semantic_head"])
def test_heads_with_another_number_of_things(coco, part):
    coco.cfg.model = {"type": "Mask2Former", part: things(3, 0)}
    (error,) = coco.check().errors
    assert error.startswith(f"model.{part}.num_things_classes is 3, but the data have 2 classes ('cat', 'dog'); set")


@pytest.mark.parametrize(("number", "stuff"), [(2, 0), (2, 5), (1, 1)])
def test_heads_with_things_and_stuff(coco, number, stuff):
    """Label maps may show stuff beside the instances; the classes may have its names."""
    loss = dict(class_weight=[1.0] * (number + stuff) + [0.1])
    coco.cfg.model = dict(type="Mask2Former", panoptic_head=things(number, stuff, loss_cls=loss))
    assert coco.check().errors == []


def test_weights_of_another_number_of_things(coco):
    coco.cfg.model = dict(type="Mask2Former", panoptic_head=things(2, 0, loss_cls=dict(class_weight=[1.0] * 81)))
    (error,) = coco.check().errors
    assert error.startswith("model.panoptic_head.loss_cls.class_weight: expected 3, one for each class and one for no")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", CocoDataset),
        ("mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py", CocoPanopticDataset),
        ("maskformer/maskformer_r50_ms-16xb1-75e_coco.py", CocoPanopticDataset),
    ],
)
def test_the_heads_of_mmdet_fit_coco(name, data):
    cfg = Config.fromfile(Path(find_spec("mmdet").origin).parent / ".mim" / "configs" / name)
    assert check_heads(cfg, list(data.METAINFO["classes"])) == ([], [])


FULL = np.ones((HEIGHT, WIDTH), int)


def test_classes_of_segmentation_in_a_string(label_maps):
    label_maps.dataset.metainfo.classes = "cat"
    (error,) = label_maps.check().errors
    assert "write classes = ('cat',)" in error


def test_one_class_with_a_softmax(label_maps):
    label_maps.dataset.metainfo.classes = ("cat",)
    head = dict(num_classes=1, loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False))
    label_maps.cfg.model = dict(decode_head=head)
    (error,) = label_maps.check().errors
    assert "one class, 'cat', and a softmax" in error


def test_fewer_classes_in_the_head(label_maps):
    label_maps.cfg.model = dict(decode_head=dict(num_classes=2), auxiliary_head=dict(num_classes=3))
    (error,) = label_maps.check().errors
    assert error.startswith("model.decode_head.num_classes is 2, but the data have 3 classes")


def test_negatives_beside_other_data(coco):
    """A data set without objects is an error by itself, but not beside another one with objects."""
    leaf = coco.cfg.train_dataloader.dataset
    del leaf["filter_cfg"]
    negatives = {**copy.deepcopy(leaf), "ann_file": "negatives.json"}
    (coco.folder / "negatives.json").write_text(json.dumps({**coco.content, "annotations": []}))
    coco.cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=[leaf, negatives])
    assert [entry.findings.errors for entry in find(coco.cfg, "train")] == [[], []]
    coco.cfg.train_dataloader.dataset = negatives
    assert "no annotation in the file" in coco.check().errors[0]


def test_images_without_annotations_beside_others(coco):
    """Semi-supervised training gives them empty ones; the data with annotations must be sound by themselves."""
    leaf = coco.cfg.train_dataloader.dataset
    del leaf["filter_cfg"]
    loader, _, *others = leaf.pipeline
    unlabelled = {**copy.deepcopy(leaf), "ann_file": "unlabelled.json"}
    unlabelled["pipeline"] = [loader, dict(type="LoadEmptyAnnotations"), *others]
    (coco.folder / "unlabelled.json").write_text(
        json.dumps({key: value for key, value in coco.content.items() if key != "annotations"})
    )
    coco.cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=[leaf, unlabelled])
    entries = find(coco.cfg, "train")
    assert [(entry.findings.errors, entry.findings.warnings) for entry in entries] == [([], [])] * 2
    coco.content["annotations"] = []
    coco.write()
    labelled, unlabelled = find(coco.cfg, "train")
    assert "no annotation in the file" in labelled.findings.errors[0] and not unlabelled.findings.errors


def test_one_class_in_each_data_set(label_maps):
    """Data sets with one class each are accepted if their classes differ."""
    for i in range(6):
        label_maps.label(i, FULL * (i >= 3))
    halves = [{**copy.deepcopy(label_maps.dataset), "indices": list(half)} for half in ((0, 1, 2), (3, 4, 5), (0, 1))]
    for chosen, wrong in ((halves[:2], 0), (halves[::2], 2), (halves[:1], 1)):
        label_maps.cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=chosen)
        entries = find(label_maps.cfg, "train")
        assert sum(bool(entry.findings.errors) for entry in entries) == wrong


def test_remote_data_are_left_alone(coco):
    coco.cfg.train_dataloader.dataset.data_root = "s3://bucket/data"
    assert next(named_paths(coco.cfg.train_dataloader.dataset)) == "s3://bucket/data/annotations.json"
    findings = coco.check()
    assert (findings.errors, "not checked, because its files are in a remote storage" in findings.summary) == ([], True)


@pytest.mark.parametrize(
    "model",
    [
        dict(language_model=dict(type="BertModel"), bbox_head=dict(num_classes=80)),
        dict(bbox_head=dict(type="GroundingDINOHead", num_classes=256)),
        dict(bbox_head=dict(type="ATSSVLFusionHead", num_classes=80)),
    ],
)
def test_open_vocabularies(coco, model):
    coco.cfg.model = model
    assert coco.check().errors == []


def test_auxiliary_heads(label_maps):
    """An auxiliary head for edges has two classes by design; for others, a different number of classes is a warning."""
    decode = dict(num_classes=3)
    label_maps.cfg.model = dict(decode_head=decode, auxiliary_head=[dict(type="STDCHead", num_classes=2)])
    findings = label_maps.check()
    assert (findings.errors, findings.warnings) == ([], [])
    label_maps.cfg.model.auxiliary_head.append(dict(type="FCNHead", num_classes=2))
    findings = label_maps.check()
    assert findings.errors == []
    assert "model.auxiliary_head.1.num_classes is 2" in findings.warnings[0]


def test_heads_are_compared_once(coco):
    coco.cfg.model = dict(bbox_head=dict(num_classes=80))
    errors = [error for entry in find(coco.cfg, "train", "val") for error in entry.findings.errors]
    assert len(errors) == 1


def test_transforms_that_are_classes(coco):
    """Configurations in pure Python name transforms by their classes."""
    coco.cfg.train_dataloader.dataset.pipeline[0]["type"] = LoadImageFromFile
    rotated(coco.folder / "images" / "1.jpg")
    (entry,) = find(coco.cfg, "train")
    assert entry.findings.as_annotated
    adapt(coco.cfg, entry)
    assert entry.settings["pipeline"][0]["type"] == AS_ANNOTATED


def test_transforms_of_label_maps_that_are_classes(label_maps):
    dataset = label_maps.cfg.test_dataloader.dataset
    dataset.pipeline[1]["type"] = LoadAnnotations
    del dataset.data_prefix["seg_map_path"]
    label_maps.cfg.test_evaluator.format_only = True
    assert "which LoadAnnotations needs" in label_maps.check("test").errors[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(type=5), "train_dataloader.dataset.type: expected the name of a class, found 5"),
        (dict(type=["CocoDataset"]), "dataset.type: expected the name of a class, found \\['CocoDataset'\\]"),
        (dict(pipeline=5), "train_dataloader.dataset.pipeline: expected a list of transforms, found 5"),
    ],
)
def test_settings_of_another_type(coco, change, message):
    coco.cfg.train_dataloader.dataset.update(change)
    with pytest.raises(UserError, match=message):
        coco.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("ann_file"), "has no ann_file"),
        (lambda d: d.update(ann_file=None), "has no ann_file"),
        (lambda d: d.update(ann_file="images"), "is a folder; name the annotation file"),
        (lambda d: d.update(data_prefix=None), "data_prefix: expected dict"),
        (lambda d: d.update(data_prefix="images"), "data_prefix: expected dict"),
        (lambda d: d.update(metainfo="cat"), "metainfo: expected dict"),
        (lambda d: d.metainfo.update(classes=[]), "classes is empty; name the classes"),
        (lambda d: d.metainfo.update(classes=["cat", "cat"]), "classes has 'cat' 2 times"),
        (lambda d: d.metainfo.update(classes=[1, 2]), "classes: expected names"),
        (lambda d: d.filter_cfg.update(min_size="32"), "filter_cfg.min_size: expected a number of pixels, found '32'"),
        (lambda d: d.update(indices="3"), "indices: expected a whole number"),
        (lambda d: d.update(indices=[0, 99]), "indices has 99, and 6 images are there"),
        (lambda d: d.update(backend_args="local"), "backend_args: expected dict"),
        (lambda d: d.update(data_root=5), "data_root: expected the path"),
    ],
)
def test_slips_in_a_configuration(coco, change, message):
    change(coco.cfg.train_dataloader.dataset)
    (error,) = coco.check().errors
    assert message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loader: loader.dataset.pop("type"), "train_dataloader.dataset has no type"),
        (lambda loader: loader.update(dataset=[loader.dataset]), "train_dataloader.dataset is a list"),
        (
            lambda loader: loader.update(dataset=dict(type="ConcatDataset", datasets=[])),
            "train_dataloader.dataset.datasets is empty",
        ),
        (lambda loader: loader.update(dataset=None), "train_dataloader.dataset: expected the settings of a data set"),
    ],
)
def test_loaders_without_a_data_set(coco, change, message):
    change(coco.cfg.train_dataloader)
    with pytest.raises(UserError, match=message):
        coco.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.data_prefix.pop("img_path"), "data_prefix has no img_path"),
        (lambda d: d.update(metainfo=None), "classes. should be specified when testing"),
        (lambda d: d.update(img_suffix=5), "the images cannot be listed"),
        (lambda d: d.update(indices=[7]), "indices has 7, and 6 images are there"),
        (lambda d: d.metainfo.update(classes=["a", "b", "a"]), "classes has 'a' 2 times"),
    ],
)
def test_slips_in_a_segmentation(label_maps, change, message):
    dataset = label_maps.cfg.test_dataloader.dataset
    dataset.test_mode = True
    change(dataset)
    (error,) = label_maps.check("test").errors
    assert re.search(message, error), error


def _metric_entries(coco) -> list:
    init_default_scope("mmdet")
    return find(coco.cfg, "val")


@pytest.mark.parametrize("nested", [False, True])
def test_an_annotation_file_of_the_evaluator(coco, nested):
    other = coco.folder / "other.json"
    if nested:
        metric = coco.cfg.val_evaluator
        coco.cfg.val_evaluator = dict(type="MultiDatasetsEvaluator", metrics=[metric], dataset_prefixes=["own"])
    metric = coco.cfg.val_evaluator.metrics[0] if nested else coco.cfg.val_evaluator
    metric["ann_file"] = str(other)
    content = copy.deepcopy(coco.content)
    content["annotations"][0]["id"] = 0
    other.write_text(json.dumps(content))
    data, evaluation = _metric_entries(coco)
    assert (data.findings.errors, evaluation.label, evaluation.findings.errors) == ([], "val_evaluator", [])
    adapt(coco.cfg, evaluation)
    assert json.loads(Path(metric["ann_file"]).read_text())["annotations"][0]["id"] == 1
    metric["ann_file"] = str(other)
    content["images"][0]["id"] = 77
    other.write_text(json.dumps(content))
    assert "1 image is not in the data that are evaluated" in _metric_entries(coco)[1].findings.errors[0]
    content["categories"][0]["name"] = "horse"
    other.write_text(json.dumps(content))
    assert "no category 'cat'" in _metric_entries(coco)[1].findings.errors[0]


def test_long_lists_of_classes_are_shortened(coco):
    coco.content["categories"] = [dict(id=i, name=f"c{i}") for i in range(90)]
    coco.write()
    (error,) = coco.check().errors
    assert "'c9' and 80 more" in error


def test_every_configuration_can_be_checked():
    """Without their data, this tests only that the check supports the types of their data sets."""
    for name in (
        "mask_rcnn_swin_pc.py",
        "upernet_swin_pc.py",
        "own_data/coco.py",
        "own_data/png_labels.py",
        "demo/mask_rcnn_swin_pc.py",
        "demo/upernet_swin_pc.py",
    ):
        cfg = load_config(str(CONFIGS / name))
        for loader in ("train", "val", "test"):
            kinds = [_kind(leaf) for leaf in leaves(cfg[f"{loader}_dataloader"].dataset)]
            assert kinds and all(kinds), name
