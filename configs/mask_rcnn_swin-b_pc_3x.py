"""Mask R-CNN, Swin-B, preconditioned attention (the default), COCO 3x, multi-scale with crop, AMP.

There is no published reference: this is the Swin-S recipe with the Swin-B of the Swin authors' Cascade Mask R-CNN.
"""

_base_ = "./mask_rcnn_swin-s_pc_3x.py"
checkpoint = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224.pth"
model = dict(
    backbone=dict(
        embed_dims=128,
        num_heads=[4, 8, 16, 32],
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
