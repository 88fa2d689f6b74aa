"""UPerNet, DaViT-T, preconditioned attention (the default), ADE20K 160k, 512 x 512.

Reference: UPerNet with DaViT-T in the DaViT paper; the recipe is mmseg's for Swin.
"""

_base_ = [
    "_base_/upernet.py",
    "_base_/ade20k.py",
    "_base_/schedule_160k.py",
    "_base_/segmentation_runtime.py",
]
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(
    backbone=dict(type="ConditionedTimmBackbone", model_name="davit_tiny", pretrained=True, drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384, in_index=2),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={"pos_embed": dict(decay_mult=0.0), "cls_token": dict(decay_mult=0.0)},
    )
)
