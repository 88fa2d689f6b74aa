"""RetinaNet, Swin-T, preconditioned attention (the default), COCO 1x, boxes only.

Reference: mmdet's swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py.
"""

_base_ = "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(backbone=dict(type="ConditionedSwinTransformer"))
