"""UPerNet, ViT-B/16, preconditioned attention (the default), ADE20K 160k, 512 x 512.

Reference: mmseg's vit/vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py.
The pretrained weights are a local file, as in mmseg's config; README.md in this folder explains how to make it.
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
        type="ConditionedVisionTransformer",
        img_size=(512, 512),
        patch_size=16,
        embed_dims=768,
        num_layers=12,
        num_heads=12,
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        norm_cfg=dict(type="LN", eps=1e-6),
        final_norm=True,
        interpolate_mode="bicubic",
        init_cfg=dict(type="Pretrained", checkpoint="pretrain/vit_base_patch16_224.pth"),
    ),
    neck=dict(
        type="MultiLevelNeck",
        in_channels=[768, 768, 768, 768],
        out_channels=768,
        scales=[4, 2, 1, 0.5],
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768, in_index=3),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "pos_embed": dict(decay_mult=0.0),
            "cls_token": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
        }
    )
)
