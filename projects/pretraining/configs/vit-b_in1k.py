"""ViT-B/16, preconditioned attention (the default), ImageNet-1k, 300 epochs.

Reference: mmpretrain's vision_transformer/vit-base-p16_64xb64_in1k.py.
"""

_base_ = "mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(backbone=dict(_delete_=True, type="Conditioned", module={{_base_.model.backbone}}, conditioning="pc"))
