"""SegFormer head, XCiT-S12/16, preconditioned attention (the default), ADE20K 160k, 512 x 512.

Reference: mmseg's segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py with another backbone.
"""

_base_ = "upernet_xcit-s_pc.py"
model = dict(
    decode_head=dict(
        _delete_=True,
        type="SegformerHead",
        in_channels=[384, 384, 384, 384],
        in_index=[0, 1, 2, 3],
        channels=256,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(decode_head=dict(lr_mult=10.0))))
