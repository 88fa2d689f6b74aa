"""Conditioned subclasses of mmdet's backbones."""

from mmdet.models.backbones import swin
from mmdet.registry import MODELS
from mmengine.registry import MODELS as ROOT_MODELS

from .swin import ConditionedSwin, make_fast_classes


@ROOT_MODELS.register_module()
@MODELS.register_module()
class ConditionedSwinTransformer(ConditionedSwin, swin.SwinTransformer):
    """mmdet's ``SwinTransformer``, conditioned.

    Shape: images (B, 3, H, W) of any size; one feature map
    (B, ``embed_dims * 2**i``, ``H / 4 / 2**i``, ``W / 4 / 2**i``),
    rounded up, for each i of ``out_indices``.
    """

    fast_classes = make_fast_classes(swin, __name__)
