"""Conditioned subclasses of mmseg's backbones."""

from mmengine.registry import MODELS as ROOT_MODELS
from mmseg.models.backbones import swin
from mmseg.models.backbones.vit import VisionTransformer
from mmseg.registry import MODELS

from .base import ConditionedBackbone
from .swin import ConditionedSwin, make_fast_classes


@MODELS.register_module()
class ConditionedSwinTransformer(ConditionedSwin, swin.SwinTransformer):
    """mmseg's ``SwinTransformer``, conditioned; shapes as in :mod:`condattn.openmmlab.models.mmdet`."""

    fast_classes = make_fast_classes(swin, __name__)


@ROOT_MODELS.register_module()
class ConditionedVisionTransformer(ConditionedBackbone, VisionTransformer):
    """mmseg's ``VisionTransformer``, conditioned.

    Shape: images (B, 3, H, W) of any size; one feature map (B, embed_dims, H / patch, W / patch), rounded up, for
    each of ``out_indices``.
    """


# Register the name without a scope, too, unless mmdet's subclass is registered under it already.
if "ConditionedSwinTransformer" not in ROOT_MODELS.module_dict:
    ROOT_MODELS.register_module(module=ConditionedSwinTransformer)
