"""The demo's Mask R-CNN on the built-in digit scenes.

Four fifths of the training scenes are used for training, half of the others for tuning, and the validation scenes for
the final evaluation.
"""

_base_ = "../../demo/_base_/mask_rcnn_digit_scenes.py"

model = dict(backbone=dict(type="ConditionedSwinTransformer", conditioning="none"))

scenes = 3000
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 96), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "instances"),
    ),
]
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True),
    batch_sampler=None,
    dataset=dict(indices=[i for i in range(scenes) if i % 5 != 4]),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    # Half of the scenes that are not trained on: with all of them, evaluations would take half of the time.
    dataset=dict(split="training", indices=list(range(4, scenes, 10)), pipeline=pipeline),
)
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=pipeline))
# Without ann_file, the metric uses the annotations of exactly the scenes that are evaluated.
val_evaluator = dict(_delete_=True, type="CocoMetric", metric=["bbox", "segm"])
test_evaluator = val_evaluator

iterations = 900
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations // 10)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=90),
    dict(type="CosineAnnealingLR", by_epoch=False, T_max=iterations),
]
default_hooks = dict(
    checkpoint=dict(_delete_=True, type="CheckpointHook", by_epoch=False, interval=iterations // 10, max_keep_ckpts=1),
)
custom_hooks = [dict(type="SpectraHook", interval=iterations // 10)]
log_processor = dict(by_epoch=False)
