"""Mask R-CNN, XCiT-S12/16, spectral conditioning with strength 10, COCO 3x, multi-scale with crop.

Reference: the Mask R-CNN of XCiT-S12/16, 36 epochs, of the XCiT authors' detection code, in float32 (theirs: float16).
XCiT normalises queries and keys, so that the strength of the paper does not saturate its attention.
"""

_base_ = "mask_rcnn_xcit-s_pc_3x.py"
model = dict(backbone=dict(conditioning=dict(type="SpectralCorrection", strength=10.0)))
