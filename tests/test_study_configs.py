"""The studies of this project: their settings fit together, and their variants start from equal weights."""

from dataclasses import replace

import pytest
import torch
from runs import CONFIGS, ROOT

pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

import condattn.registry  # noqa: F401  registers the models
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.study.check import check_metric
from condattn.openmmlab.study.plan import FINAL, RunId, load_study
from condattn.openmmlab.study.run import LOADERS, training_config

STUDIES = sorted((CONFIGS / "studies").glob("*.py"))


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
