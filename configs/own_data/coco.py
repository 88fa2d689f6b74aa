"""Mask R-CNN on your own COCO-format data: copy this file, edit its first block, train the copy.

For data with boxes only, set `_base_` to '../retinanet_swin_pc.py'; every other COCO config of that folder works too.
"""

_base_ = "../mask_rcnn_swin_pc.py"

data_root = "data/own"
classes = ["cat", "dog"]  # the category names in the annotation files
train = dict(ann_file="annotations/train.json", data_prefix=dict(img="images/train/"))
val = dict(ann_file="annotations/val.json", data_prefix=dict(img="images/val/"))
image_size = (1333, 800)  # largest longer and shorter side after resizing; 3x recipes vary the size in training
batch_size = 4
max_epochs = 24

# ---------------------------------------------------------------- the rest follows from the block above

# Below _base_, because mmengine 0.10 would take a config that begins with an import for one of its other kind.
from os.path import join  # noqa: E402


def with_values(node, **values):
    """Copy `node`, replacing the value of each key in `values` at every depth; a callable gets the old value."""
    if isinstance(node, dict):
        copy = {key: child if key in values else with_values(child, **values) for key, child in node.items()}
        new = {key: values[key] for key in node.keys() & values.keys()}
        return copy | {key: value(node[key]) if callable(value) else value for key, value in new.items()}
    return [with_values(child, **values) for child in node] if isinstance(node, list) else node


def with_classes(weights):
    """Adapt a list of class weights to the number of classes; its last entry is the weight of 'no object'."""
    return weights[:1] * len(classes) + weights[-1:] if isinstance(weights, list) else weights


model = with_values(_base_.model, num_classes=len(classes), num_things_classes=len(classes), class_weight=with_classes)

dataset = dict(data_root=data_root, metainfo=dict(classes=classes))
train_pipeline = with_values(_base_.train_dataloader.dataset.pipeline, scale=image_size)
test_pipeline = with_values(_base_.val_dataloader.dataset.pipeline, scale=image_size)
train_dataloader = dict(
    batch_size=batch_size,
    sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True),
    dataset=dict(pipeline=train_pipeline, **dataset, **train),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **dataset, **val))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=join(data_root, val["ann_file"]))
test_evaluator = val_evaluator

# 1e-4 is the rate for 16 images per batch; with Adam, it scales with the square root of the batch size.
# On N GPUs, write N * batch_size here, and do not use --auto-scale-lr.
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type="AdamW",
        lr=1e-4 * (batch_size / 16) ** 0.5,
        betas=(0.9, 0.999),
        weight_decay=0.05,
    ),
    paramwise_cfg=dict(
        custom_keys={
            "absolute_pos_embed": dict(decay_mult=0.0),
            "relative_position_bias_table": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
        }
    ),
)
auto_scale_lr = dict(base_batch_size=batch_size)
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=max_epochs)
param_scheduler = [  # warm-up of one epoch, or of 1/24 of a training that is shorter than 24 epochs
    dict(type="WarmUpLR", start_factor=0.01, end=min(1, max_epochs / 24), by_epoch=True, convert_to_iter_based=True),
    dict(
        type="MultiStepLR",
        by_epoch=True,
        begin=0,
        end=max_epochs,
        milestones=sorted({max_epochs * 2 // 3, max_epochs * 11 // 12} - {0}),
        gamma=0.1,
    ),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=True, interval=1, max_keep_ckpts=2, save_best="coco/bbox_mAP"),
)
log_processor = dict(by_epoch=True)
