"""Conditioned subclasses of mmseg's backbones."""

from mmengine.registry import MODELS as ROOT_MODELS
from mmseg.models.backbones import swin
from mmseg.models.backbones.vit import VisionTransformer
from mmseg.registry import MODELS

from .base import ConditionedBackbone
from .swin import ConditionedSwin, make_fast_classes


@MODELS.register_module()
class ConditionedSwinTransformer(ConditionedSwin, swin.SwinTransformer):
    """mmseg's ``SwinTransformer``, conditioned; shapes and arguments as in :mod:`condattn.openmmlab.models.mmdet`."""

    fast_classes = make_fast_classes(swin, __name__)


@ROOT_MODELS.register_module()
class ConditionedVisionTransformer(ConditionedBackbone, VisionTransformer):
    """mmseg's ``VisionTransformer``, conditioned.

    Shape: images (B, 3, H, W) of any size; one feature map (B, embed_dims, H / patch, W / patch), rounded up, for
    each of ``out_indices``.

    Args:
        conditioning: How the attention is conditioned; see :func:`condattn.condition`. Default: ``'pc'``.
        **kwargs: Arguments of the upstream class, ``init_cfg`` among them; its type 'Pretrained' has the settings of
            :class:`.base.ConditionedBackbone`.

    Raises:
        ValueError: If the conditioning is unknown or invalid.
    """


# Register the name without a scope, too, unless mmdet's subclass is registered under it already.
if "ConditionedSwinTransformer" not in ROOT_MODELS.module_dict:
    ROOT_MODELS.register_module(module=ConditionedSwinTransformer)
