"""Conditioned subclasses of mmdet's backbones."""

from mmdet.models.backbones.swin import PatchEmbed, PatchMerging, ShiftWindowMSA, SwinBlock, SwinTransformer
from mmdet.registry import MODELS
from mmengine.registry import MODELS as ROOT_MODELS

from .swin import ConditionedSwin, FastPatchEmbed, FastPatchMerging, FastShiftWindowMSA, FastSwinBlock


class FastAttention(FastShiftWindowMSA, ShiftWindowMSA):
    """mmdet's ``ShiftWindowMSA`` with a fast forward."""


class FastBlock(FastSwinBlock, SwinBlock):
    """mmdet's ``SwinBlock`` with a fast forward."""


class FastEmbed(FastPatchEmbed, PatchEmbed):
    """mmdet's ``PatchEmbed`` with a fast forward."""


class FastMerging(FastPatchMerging, PatchMerging):
    """mmdet's ``PatchMerging`` with a fast forward."""


@ROOT_MODELS.register_module()
@MODELS.register_module()
class ConditionedSwinTransformer(ConditionedSwin, SwinTransformer):
    """mmdet's ``SwinTransformer``, conditioned.

    Shape: images (B, 3, H, W) of any size; one feature map (B, embed_dims * 2**i, H / 4 / 2**i, W / 4 / 2**i),
    rounded up, for each i of ``out_indices``.
    """

    fast_classes = {  # noqa: RUF012
        PatchEmbed: FastEmbed,
        ShiftWindowMSA: FastAttention,
        SwinBlock: FastBlock,
        PatchMerging: FastMerging,
    }
