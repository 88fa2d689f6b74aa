"""Mask R-CNN, ViT-B of ViTDet, preconditioned attention (the default), COCO 3x, multi-scale with crop.

Reference: ViTDet's backbone and pyramid (windows of 14, global attention in blocks 2, 5, 8 and 11). Heads and
recipe are those of mmdet's Swin, instead of ViTDet's heads, 100 epochs with large-scale jittering, and layer-wise
learning rates. The weights are those of SAM's image encoder, which has the same architecture.
"""

_base_ = "mask_rcnn_deit-s_pc_3x.py"
model = dict(backbone=dict(model_name="samvit_base_patch16"), neck=dict(in_channels=768))
