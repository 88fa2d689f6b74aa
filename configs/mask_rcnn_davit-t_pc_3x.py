"""Mask R-CNN, DaViT-T, preconditioned attention (the default), COCO 3x, multi-scale with crop.

Reference: Mask R-CNN with DaViT-T, 36 epochs, in the DaViT paper; the recipe is mmdet's for Swin.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True, type="ConditionedTimmBackbone", model_name="davit_tiny", pretrained=True, drop_path_rate=0.2
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        norm_decay_mult=0.0,
        custom_keys={"pos_embed": dict(decay_mult=0.0), "cls_token": dict(decay_mult=0.0)},
    )
)
