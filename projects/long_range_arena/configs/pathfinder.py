"""Nystromformer on Pathfinder: whether a dashed curve joins two points, from the sequence of 1,024 grey levels.

Of the authors' settings, see _base_/nystromformer.py: batches of 256, 62,400 iterations with 312 of warm-up, and the
most difficult of the three sets of images, curv_contour_length_14.
"""

_base_ = "_base_/nystromformer.py"

length = 1024
model = dict(encoder=dict(module=dict(vocab_size=257, length=length)), num_classes=2)

dataset = dict(type="Pathfinder32", data_root="{{$LRA_DATA:data}}/lra_release/pathfinder32", length=length)
train_dataloader = dict(batch_size=256, dataset=dataset)
val_dataloader = dict(batch_size=256, dataset=dataset)
test_dataloader = dict(batch_size=256, dataset=dataset)

iterations, warm_up = 62400, 312
train_cfg = dict(max_iters=iterations, val_interval=iterations // 20)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.04, by_epoch=False, end=warm_up),
    dict(type="LinearLR", start_factor=1.0, end_factor=0.0, by_epoch=False, begin=warm_up, end=iterations),
]
default_hooks = dict(checkpoint=dict(interval=iterations // 20))
