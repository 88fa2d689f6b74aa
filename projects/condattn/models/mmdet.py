"""Conditioned faces of mmdet's backbones."""

from mmdet.models.backbones.swin import SwinTransformer
from mmdet.registry import MODELS
from mmengine.registry import MODELS as ROOT_MODELS

from .base import ConditionedBackbone


@ROOT_MODELS.register_module()
@MODELS.register_module()
class ConditionedSwinTransformer(ConditionedBackbone, SwinTransformer):
    """mmdet's ``SwinTransformer``, conditioned.

    Shape: images (B, 3, H, W) of any size; one feature map (B, embed_dims * 2**i, H / 4 / 2**i, W / 4 / 2**i),
    rounded up, for each i of ``out_indices``.
    """
