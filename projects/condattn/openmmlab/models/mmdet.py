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

    Args:
        conditioning: How the attention is conditioned; see :func:`condattn.condition`. Default: ``'pc'``.
        fast_attention: Whether the fast paths run (docs/performance.md). False is upstream's own forward.
        **kwargs: Arguments of the upstream class, ``init_cfg`` among them; its type 'Pretrained' has the settings of
            :class:`.base.ConditionedBackbone`.

    Raises:
        ValueError: If the conditioning is unknown or invalid.
    """

    fast_classes = make_fast_classes(swin, __name__)
