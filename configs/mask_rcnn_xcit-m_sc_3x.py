"""Mask R-CNN, XCiT-M24/16, spectral conditioning with strength 10, COCO 3x, multi-scale with crop.

Reference: Mask R-CNN with XCiT-M24/16, 36 epochs, in the XCiT authors' detection code; float32 instead of float16.
XCiT normalises queries and keys, so that the strength of the paper does not saturate its attention.
"""

_base_ = "mask_rcnn_xcit-m_pc_3x.py"
model = dict(backbone=dict(conditioning=dict(type="SpectralCorrection", strength=10.0)))
