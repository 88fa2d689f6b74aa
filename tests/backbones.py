"""Small backbones of OpenMMLab for tests."""

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope

import condattn.registry  # noqa: F401  registers the models

SMALL = dict(embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 3), drop_path_rate=0.0)
VIT = dict(
    img_size=32,
    patch_size=8,
    embed_dims=24,
    num_layers=3,
    num_heads=3,
    mlp_ratio=2,
    out_indices=(0, 2),
    drop_path_rate=0.0,
)


def build(scope, type, **settings):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(ConfigDict(type=type, **settings))
