"""Mask R-CNN, Swin-S, preconditioned attention (the default), COCO 3x, multi-scale with crop, AMP.

Reference: mmdet's swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(backbone=dict(type="ConditionedSwinTransformer"))
