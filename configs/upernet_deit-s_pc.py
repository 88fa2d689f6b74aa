"""UPerNet, DeiT-S, preconditioned attention (the default), ADE20K 160k, 512 x 512.

Reference: mmseg's vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py, with timm's model and weights.
"""

_base_ = "upernet_vit_pc.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="ConditionedTimmBackbone",
        model_name="deit_small_patch16_224",
        pretrained=True,
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[384, 384, 384, 384], out_channels=384),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
