"""Mask R-CNN, XCiT-S12/16, preconditioned attention (the default), COCO 3x, multi-scale with crop.

Reference: Mask R-CNN with XCiT-S12/16, 36 epochs, in the XCiT authors' detection code; float32 instead of float16.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type="ConditionedTimmBackbone",
        model_name="xcit_small_12_p16_224",
        pretrained=True,
        out_indices=(3, 5, 7, 11),
        drop_path_rate=0.05,
    ),
    neck=[
        dict(type="mmseg.Feature2Pyramid", embed_dim=384),
        dict(type="FPN", in_channels=[384] * 4, out_channels=256, num_outs=5),
    ],
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        norm_decay_mult=0.0,
        custom_keys={"pos_embed": dict(decay_mult=0.0), "cls_token": dict(decay_mult=0.0)},
    )
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
