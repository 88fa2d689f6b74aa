"""Conditioned subclasses of mmseg's backbones."""

from mmengine.registry import MODELS as ROOT_MODELS
from mmseg.models.backbones.swin import PatchEmbed, PatchMerging, ShiftWindowMSA, SwinBlock, SwinTransformer
from mmseg.models.backbones.vit import VisionTransformer
from mmseg.registry import MODELS

from .base import ConditionedBackbone
from .swin import ConditionedSwin, FastPatchEmbed, FastPatchMerging, FastShiftWindowMSA, FastSwinBlock


class FastAttention(FastShiftWindowMSA, ShiftWindowMSA):
    """mmseg's ``ShiftWindowMSA`` with a fast forward."""


class FastBlock(FastSwinBlock, SwinBlock):
    """mmseg's ``SwinBlock`` with a fast forward."""


class FastEmbed(FastPatchEmbed, PatchEmbed):
    """mmseg's ``PatchEmbed`` with a fast forward."""


class FastMerging(FastPatchMerging, PatchMerging):
    """mmseg's ``PatchMerging`` with a fast forward."""


@MODELS.register_module()
class ConditionedSwinTransformer(ConditionedSwin, SwinTransformer):
    """mmseg's ``SwinTransformer``, conditioned; shapes as in :mod:`condattn.openmmlab.models.mmdet`."""

    fast_classes = {  # noqa: RUF012
        PatchEmbed: FastEmbed,
        ShiftWindowMSA: FastAttention,
        SwinBlock: FastBlock,
        PatchMerging: FastMerging,
    }


@ROOT_MODELS.register_module()
class ConditionedVisionTransformer(ConditionedBackbone, VisionTransformer):
    """mmseg's ``VisionTransformer``, conditioned.

    Shape: images (B, 3, H, W) of any size; one feature map (B, embed_dims, H / patch, W / patch), rounded up, for
    each of ``out_indices``.
    """


# The name also answers without a scope; where mmdet is installed, it is mmdet's subclass.
if "ConditionedSwinTransformer" not in ROOT_MODELS.module_dict:
    ROOT_MODELS.register_module(module=ConditionedSwinTransformer)
