"""Mask R-CNN, Swin-B, spectral correction, COCO 3x, multi-scale with crop, AMP.

Reference: that of mask_rcnn_swin-b_pc_3x.py, with the same settings otherwise.
"""

_base_ = "./mask_rcnn_swin-b_pc_3x.py"
model = dict(backbone=dict(conditioning="sc"))
