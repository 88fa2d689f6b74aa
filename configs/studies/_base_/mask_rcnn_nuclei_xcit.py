"""Mask R-CNN with a small XCiT, whose attention is between channels, on nuclei in microscopy images."""

_base_ = "mask_rcnn_nuclei.py"

strides = [4, 8, 16, 32]
model = dict(
    backbone=dict(
        _delete_=True,
        type="ConditionedTimmBackbone",
        model_name="xcit_nano_12_p8_224",
        conditioning="none",
        embed_dim=96,
        depth=6,
        num_heads=4,
        out_indices=(1, 2, 4, 5),
    ),
    neck=[
        dict(
            type="mmseg.Feature2Pyramid",
            embed_dim=96,
            rescales=[2, 1, 0.5, 0.25],  # of stride 8, to 4, 8, 16 and 32
            norm_cfg=dict(type="GN", num_groups=8),
        ),
        dict(
            type="FPN",
            in_channels=[96, 96, 96, 96],
            out_channels=64,
            num_outs=4,
            norm_cfg=dict(type="GN", num_groups=8),
        ),
    ],
    rpn_head=dict(anchor_generator=dict(strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=strides),
        mask_roi_extractor=dict(featmap_strides=strides),
    ),
)
