"""UPerNet with a small Swin on street scenes (CamVid).

The environment variable CAMVID names a folder with images/{train,val,test} and annotations/{train,val,test}, label maps
with the values 0 to 10, and 255 for ignored pixels. The training images are used for training, the validation images
for tuning, and the test images for the final evaluation.
"""

_base_ = "../../demo/upernet_swin_pc.py"

classes = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
model = dict(
    data_preprocessor=dict(size=(128, 128), test_cfg=dict(size_divisor=32)),
    backbone=dict(conditioning="none", window_size=8),
    decode_head=dict(num_classes=len(classes), loss_decode=dict(class_weight=None)),
)

root = "{{$CAMVID:data/camvid}}"
scale = (240, 180)
dataset = dict(
    _delete_=True,
    type="BaseSegDataset",
    data_root=root,
    metainfo=dict(classes=classes),
    img_suffix=".jpg",
    seg_map_suffix=".png",
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/train", seg_map_path="annotations/train"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomResize", scale=scale, ratio_range=(0.8, 1.5), keep_ratio=True),
            dict(type="RandomCrop", crop_size=(128, 128), cat_max_ratio=0.75),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/val", seg_map_path="annotations/val"),
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
        data_prefix=dict(img_path="images/test", seg_map_path="annotations/test"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)

iterations = 800
train_cfg = dict(max_iters=iterations, val_interval=iterations // 10)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=80),
    dict(type="CosineAnnealingLR", by_epoch=False, T_max=iterations),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(_delete_=True, type="CheckpointHook", by_epoch=False, interval=iterations // 10, max_keep_ckpts=1),
)
custom_hooks = [dict(type="SpectraHook", interval=iterations // 10)]
