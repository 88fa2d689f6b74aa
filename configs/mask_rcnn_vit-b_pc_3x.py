"""Mask R-CNN, ViT-B of ViTDet, preconditioned attention (the default), COCO 3x, multi-scale with crop.

Twin: ViTDet's backbone and pyramid (windows of 14, global attention in blocks 2, 5, 8 and 11), with the heads and the
recipe of mmdet's Swin in place of its own heads, 100 epochs of large-scale jittering and layer-wise rates; SAM's image
encoder, which has the same architecture, gives the weights.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type="ConditionedTimmBackbone",
        model_name="samvit_base_patch16",
        pretrained=True,
        drop_path_rate=0.1,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=768, out_channels=256, num_outs=5),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        norm_decay_mult=0.0,
        custom_keys={"pos_embed": dict(decay_mult=0.0), "cls_token": dict(decay_mult=0.0)},
    )
)
