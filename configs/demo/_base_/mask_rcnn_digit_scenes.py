"""A small Mask R-CNN with Swin on the digit scenes, which trains in a few minutes on two CPU cores."""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)

gn = dict(type="GN", num_groups=8)
roi_extractor = dict(roi_layer=dict(sampling_ratio=1), out_channels=64, featmap_strides=[4, 8, 16])
model = dict(
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dims=32,
        depths=(2, 2, 2),
        num_heads=(2, 4, 8),
        strides=(4, 2, 2),
        out_indices=(0, 1, 2),
        window_size=6,  # divides the feature maps of 24, 12 and 6 cells
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[32, 64, 128], out_channels=64, num_outs=3, norm_cfg=gn),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[6], strides=[4, 8, 16]),
    ),
    roi_head=dict(
        bbox_roi_extractor=roi_extractor,
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=roi_extractor,
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=32, num_classes=10, norm_cfg=gn),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=20)),
)

resize = dict(type="Resize", scale=(96, 96), keep_ratio=True)
annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="DigitScenesDetection",
        split="training",
        pipeline=[dict(type="LoadImageFromFile"), annotations, resize, dict(type="PackDetInputs")],
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="DigitScenesDetection",
        split="validation",
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            resize,
            annotations,
            dict(
                type="PackDetInputs",
                meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
            ),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric",
    ann_file="data/digit_scenes/annotations/instances_validation.json",
    metric=["bbox", "segm"],
)
test_evaluator = val_evaluator

epochs = 3
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=100),
    dict(type="CosineAnnealingLR", T_max=epochs, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(max_keep_ckpts=1, save_best="coco/bbox_mAP"),
    visualization=dict(score_thr=0.5),
)
visualizer = dict(line_width=1)
custom_hooks = [dict(type="SpectraHook")]  # condition numbers, every 500 iterations
randomness = dict(seed=0)
