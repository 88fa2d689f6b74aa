"""XCiT-M24/16, preconditioned attention (the default), ImageNet-1k, 300 epochs.

Reference: mmpretrain's xcit/xcit-medium-24-p16_8xb128_in1k.py, which mmpretrain wrote for the evaluation of
converted weights: its training settings are those of Swin, which follow DeiT's, as XCiT's authors do. They train 400
epochs, with stochastic depth, which mmpretrain's XCiT-M has not.
"""

_base_ = "mmpretrain::xcit/xcit-medium-24-p16_8xb128_in1k.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(backbone=dict(_delete_=True, type="Conditioned", module={{_base_.model.backbone}}, conditioning="pc"))
