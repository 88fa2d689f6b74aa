"""mmdet's and mmseg's own functions load the shipped configurations of whole conditioned models."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.apis import inference_detector, init_detector
from mmseg.apis import inference_model, init_model
from whole_models import NAMES, small

import condattn
from condattn.openmmlab.runner.launch import build_model, load_config
from condattn.openmmlab.runner.rewriting import write_checkpoint

APIS = {"mmdet": (init_detector, inference_detector), "mmseg": (init_model, inference_model)}


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_model_is_loaded(name, tmp_path):
    small(name).dump(tmp_path / "config.py")
    cfg = load_config(str(tmp_path / "config.py"))
    trained = build_model(cfg)
    write_checkpoint(tmp_path / "weights.pth", trained, {"dataset_meta": {"classes": ["cat"], "palette": [[0, 0, 0]]}})
    load, infer = APIS[cfg.default_scope]
    for given in (str(tmp_path / "config.py"), copy.deepcopy(cfg)):
        model = load(given, str(tmp_path / "weights.pth"), device="cpu")
        assert condattn.conditioning_of(model) == condattn.conditioning_of(trained)
        for key, value in model.state_dict().items():  # mmdet leaves some memory as it is, which may be NaN
            torch.testing.assert_close(value, trained.state_dict()[key], rtol=0, atol=0, equal_nan=True)
    infer(model, np.zeros((48, 64, 3), dtype=np.uint8))
    cfg.model.conditioning = "none"
    with pytest.raises(ValueError, match="is of a model with conditioning='pc'"):
        load(cfg, str(tmp_path / "weights.pth"), device="cpu")
