"""Mask R-CNN with a small Swin on nuclei in microscopy images.

The model is trained on crops of 128 pixels and evaluated on whole images. The environment variable NUCLEI names a
folder in COCO's layout: annotations/instances_{train,val}.json and images/. Four fifths of the training images are used
for training, the rest for tuning, and the validation images for the final evaluation.
"""

_base_ = "../../demo/_base_/mask_rcnn_digit_scenes.py"

model = dict(
    backbone=dict(type="ConditionedSwinTransformer", conditioning="none", window_size=8),
    rpn_head=dict(anchor_generator=dict(scales=[4], strides=[4, 8, 16])),
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=300, max_per_img=150)),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300), rcnn=dict(max_per_img=200)),
)

root = "{{$NUCLEI:data/nuclei}}"
images = 535
annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
resize = dict(type="Resize", scale=(320, 320), keep_ratio=True)
dataset = dict(
    _delete_=True,
    type="CocoDataset",
    data_root=root,
    data_prefix=dict(img="images/"),
    metainfo=dict(classes=("nucleus",)),
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    annotations,
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "instances"),
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True),
    batch_sampler=None,
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_train.json",
        indices=[i for i in range(images) if i % 5 != 4],
        pipeline=[
            dict(type="LoadImageFromFile"),
            annotations,
            resize,
            dict(type="RandomCrop", crop_size=(128, 128)),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_train.json",
        indices=list(range(4, images, 5)),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_val.json",
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
# Without ann_file, the metric uses the annotations of exactly the images that are evaluated.
val_evaluator = dict(_delete_=True, type="CocoMetric", metric=["bbox", "segm"], proposal_nums=(100, 300, 1000))
test_evaluator = val_evaluator

iterations = 600
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations // 10)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=60),
    dict(type="CosineAnnealingLR", by_epoch=False, T_max=iterations),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(_delete_=True, type="CheckpointHook", by_epoch=False, interval=iterations // 10, max_keep_ckpts=1),
)
custom_hooks = [dict(type="SpectraHook", interval=iterations // 10)]
log_processor = dict(by_epoch=False)
