"""SegFormer head, DaViT-T, preconditioned attention (the default), ADE20K 160k, 512 x 512.

Reference: mmseg's segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py with another backbone.
"""

_base_ = "segformer_xcit-s_pc.py"
model = dict(
    backbone=dict(
        _delete_=True, type="ConditionedTimmBackbone", model_name="davit_tiny", pretrained=True, drop_path_rate=0.2
    ),
    neck=None,
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
