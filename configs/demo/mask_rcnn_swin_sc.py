"""Mask R-CNN on the built-in digit scenes, backbone conditioned with SC."""

_base_ = "_base_/mask_rcnn_digit_scenes.py"

model = dict(backbone=dict(type="ConditionedSwinTransformer", conditioning="sc"))
