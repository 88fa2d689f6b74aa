"""Conditioned faces of mmseg's backbones."""

from mmengine.registry import MODELS as ROOT_MODELS
from mmseg.models.backbones.swin import SwinTransformer
from mmseg.models.backbones.vit import VisionTransformer
from mmseg.registry import MODELS

from .base import ConditionedBackbone


@MODELS.register_module()
class ConditionedSwinTransformer(ConditionedBackbone, SwinTransformer):
    """mmseg's ``SwinTransformer``, conditioned; shapes as in :mod:`condattn.models.mmdet`."""


@ROOT_MODELS.register_module()
class ConditionedVisionTransformer(ConditionedBackbone, VisionTransformer):
    """mmseg's ``VisionTransformer``, conditioned.

    Shape: images (B, 3, H, W) of any size; one feature map (B, embed_dims, H / patch, W / patch), rounded up, for
    each of ``out_indices``.
    """


# The name also answers without a scope; where mmdet is installed, its face does.
if "ConditionedSwinTransformer" not in ROOT_MODELS.module_dict:
    ROOT_MODELS.register_module(module=ConditionedSwinTransformer)
