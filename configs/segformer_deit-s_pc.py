"""SegFormer head, DeiT-S, preconditioned attention (the default), ADE20K 160k, 512 x 512.

Reference: mmseg's segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py with another backbone.
"""

_base_ = "segformer_xcit-s_pc.py"
model = dict(
    backbone=dict(model_name="deit_small_patch16_224", out_indices=(2, 5, 8, 11), drop_path_rate=0.1),
)
