"""A small UPerNet with Swin on the built-in digit scenes, backbone conditioned with PC."""

_base_ = ["../_base_/upernet.py", "../_base_/segmentation_runtime.py"]
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(
        type="ConditionedSwinTransformer",
        conditioning="pc",
        embed_dims=32,
        depths=(2, 2, 4),
        num_heads=(2, 4, 8),
        strides=(4, 2, 2),
        out_indices=(0, 1, 2),
        window_size=6,  # divides the feature maps of 24, 12 and 6 cells
        drop_path_rate=0.0,
    ),
    decode_head=dict(
        in_channels=[32, 64, 128],
        in_index=[0, 1, 2],
        dropout_ratio=0.0,
        channels=64,
        num_classes=11,
        norm_cfg=dict(_delete_=True, type="GN", num_groups=8),
        loss_decode=dict(class_weight=[0.3] + [1.0] * 10),  # most pixels are background
    ),
    auxiliary_head=None,
)

resize = dict(type="Resize", scale=(96, 96), keep_ratio=True)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="DigitScenesSegmentation",
        split="training",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            resize,
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="DigitScenesSegmentation",
        split="validation",
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            resize,
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=3000, val_interval=500)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=100),
    dict(type="CosineAnnealingLR", by_epoch=False, T_max=3000),
]
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(interval=500, max_keep_ckpts=1, save_best="mIoU"),
)
custom_hooks = [dict(type="SpectraHook")]  # condition numbers, every 500 iterations
randomness = dict(seed=0)
