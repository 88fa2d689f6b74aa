"""Mask R-CNN, DeiT-S, preconditioned attention (the default), COCO 3x, multi-scale with crop.

There is no published reference: this is a plain ViT with global attention and ViTDet's simple feature pyramid, trained
with mmdet's recipe for Swin.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type="ConditionedTimmBackbone",
        model_name="deit_small_patch16_224",
        pretrained=True,
        drop_path_rate=0.1,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=384, out_channels=256, num_outs=5),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        norm_decay_mult=0.0,
        custom_keys={"pos_embed": dict(decay_mult=0.0), "cls_token": dict(decay_mult=0.0)},
    )
)
