"""DaViT-B, preconditioned attention (the default), ImageNet-1k, 300 epochs.

Reference: mmpretrain's davit/davit-base_4xb256_in1k.py, which mmpretrain wrote for the evaluation of converted
weights: its training settings are those of Swin.
"""

_base_ = "mmpretrain::davit/davit-base_4xb256_in1k.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(backbone=dict(_delete_=True, type="Conditioned", module={{_base_.model.backbone}}, conditioning="pc"))
