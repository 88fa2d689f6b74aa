"""UPerNet on your own images and PNG label maps: copy this file, edit its first block, train the copy.

A label map is a PNG with one channel, with the size and the name of its image: value i is classes[i], 255 is ignored.
"""

_base_ = "../upernet_swin_pc.py"

data_root = "data/own"
classes = ["background", "cat", "dog"]
train = dict(img_path="images/train", seg_map_path="annotations/train")
val = dict(img_path="images/val", seg_map_path="annotations/val")
image_suffix = ".jpg"
image_size = (2048, 512)  # largest longer and shorter side after resizing
crop_size = (512, 512)
batch_size = 4
max_iters = 8000

# ---------------------------------------------------------------- the rest follows from the block above
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(num_classes=len(classes)),
    auxiliary_head=dict(num_classes=len(classes)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=image_size, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
dataset = dict(type="BaseSegDataset", data_root=data_root, metainfo=dict(classes=classes), img_suffix=image_suffix)
train_dataloader = dict(batch_size=batch_size, dataset=dict(data_prefix=train, pipeline=train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(data_prefix=val, pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

# 6e-5 is the rate for 16 images per batch; with Adam, it scales with the square root of the batch size.
# On N GPUs, write N * batch_size here, and do not use --auto-scale-lr.
optim_wrapper = dict(optimizer=dict(lr=6e-5 * (batch_size / 16) ** 0.5))
auto_scale_lr = dict(base_batch_size=batch_size)
interval = max(max_iters // 10, 1)
warm_up = max_iters // 40 if max_iters >= 80 else 0  # LinearLR with a single step would keep the start factor
train_cfg = dict(max_iters=max_iters, val_interval=interval)
decay = dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=warm_up, end=max_iters)
param_scheduler = [decay]
if warm_up:
    param_scheduler.insert(0, dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warm_up))
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=interval, max_keep_ckpts=2, save_best="mIoU"),
)
