"""Mask R-CNN, Swin-T, spectral correction, COCO 1x.

Reference: that of mask_rcnn_swin_pc.py, with the same settings otherwise.
"""

_base_ = "./mask_rcnn_swin_pc.py"
model = dict(backbone=dict(conditioning="sc"))
