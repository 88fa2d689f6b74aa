"""DINO, four scales, ResNet-50, preconditioned attention in encoder and decoder, COCO 12 epochs.

Reference: mmdet's dino/dino-4scale_r50_8xb2-12e_coco.py.
"""

_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(type="Conditioned", module="DINO", conditioning="pc")
