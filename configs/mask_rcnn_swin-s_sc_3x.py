"""Mask R-CNN, Swin-S, spectral correction, COCO 3x, multi-scale with crop, AMP.

Reference: that of mask_rcnn_swin-s_pc_3x.py, with the same settings otherwise.
"""

_base_ = "./mask_rcnn_swin-s_pc_3x.py"
model = dict(backbone=dict(conditioning="sc"))
