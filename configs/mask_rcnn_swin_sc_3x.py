"""Mask R-CNN, Swin-T, spectral correction, COCO 3x, multi-scale with crop.

Reference: that of mask_rcnn_swin_pc_3x.py, with the same settings otherwise.
"""

_base_ = "./mask_rcnn_swin_pc_3x.py"
model = dict(backbone=dict(conditioning="sc"))
