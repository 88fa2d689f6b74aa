"""SegFormer head, DeiT-S, preconditioned attention (the default), ADE20K 160k, 512 x 512.

Twin: mmseg's segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py with another backbone.
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
        model_name="deit_small_patch16_224",
        pretrained=True,
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
    ),
    neck=dict(type="Feature2Pyramid", embed_dim=384),
    decode_head=dict(
        _delete_=True,
        type="SegformerHead",
        in_channels=[384, 384, 384, 384],
        in_index=[0, 1, 2, 3],
        channels=256,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            "pos_embed": dict(decay_mult=0.0),
            "cls_token": dict(decay_mult=0.0),
            "decode_head": dict(lr_mult=10.0),
        },
    )
)
