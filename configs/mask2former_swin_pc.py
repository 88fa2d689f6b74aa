"""Mask2Former, Swin-T, preconditioned attention in backbone, pixel decoder and decoder, COCO instances, 50 epochs.

Reference: mmdet's mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py.
"""

_base_ = "mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(type="Conditioned", module="Mask2Former", conditioning="pc")
