"""DETR, ResNet-50, preconditioned attention in encoder and decoder, COCO 150 epochs.

Reference: mmdet's detr/detr_r50_8xb2-150e_coco.py.
"""

_base_ = "mmdet::detr/detr_r50_8xb2-150e_coco.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(type="Conditioned", module="DETR", conditioning="pc")
