"""Swin-B, preconditioned attention (the default), ImageNet-1k, 300 epochs.

Reference: mmpretrain's swin_transformer/swin-base_16xb64_in1k.py.
"""

_base_ = "mmpretrain::swin_transformer/swin-base_16xb64_in1k.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(backbone=dict(_delete_=True, type="Conditioned", module={{_base_.model.backbone}}, conditioning="pc"))
