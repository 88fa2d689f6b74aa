"""UPerNet, XCiT-S12/16, preconditioned attention (the default), ADE20K 160k, 512 x 512.

Reference: UPerNet with XCiT-S12/16 in the XCiT authors' segmentation code.
"""

_base_ = [
    "_base_/upernet.py",
    "_base_/ade20k.py",
    "_base_/schedule_160k.py",
    "_base_/segmentation_runtime.py",
]
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        type="ConditionedTimmBackbone",
        model_name="xcit_small_12_p16_224",
        pretrained=True,
        out_indices=(3, 5, 7, 11),
        drop_path_rate=0.05,
    ),
    neck=dict(type="Feature2Pyramid", embed_dim=384),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384, in_index=2),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={"pos_embed": dict(decay_mult=0.0), "cls_token": dict(decay_mult=0.0)},
    )
)
