"""Mask R-CNN, ViT-B of ViTDet, preconditioned attention (the default), COCO 3x, multi-scale with crop.

Reference: ViTDet's backbone and pyramid (windows of 14, global attention in blocks 2, 5, 8 and 11), with the heads and
the recipe of mmdet's Swin in place of its own heads, 100 epochs of large-scale jittering and layer-wise rates; SAM's
image encoder, which has the same architecture, gives the weights.
"""

_base_ = "mask_rcnn_deit-s_pc_3x.py"
model = dict(backbone=dict(model_name="samvit_base_patch16"), neck=dict(in_channels=768))
