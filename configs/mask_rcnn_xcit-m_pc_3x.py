"""Mask R-CNN, XCiT-M24/16, preconditioned attention (the default), COCO 3x, multi-scale with crop.

Reference: Mask R-CNN with XCiT-M24/16, 36 epochs, in the XCiT authors' detection code; float32 instead of float16.
"""

_base_ = "mask_rcnn_xcit-s_pc_3x.py"
model = dict(
    backbone=dict(model_name="xcit_medium_24_p16_224", out_indices=(7, 11, 15, 23), drop_path_rate=0.15),
    neck=[
        dict(type="mmseg.Feature2Pyramid", embed_dim=512),
        dict(type="FPN", in_channels=[512] * 4, out_channels=256, num_outs=5),
    ],
)
