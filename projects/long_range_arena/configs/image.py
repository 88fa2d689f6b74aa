"""Nystromformer on Image: what a photograph of CIFAR-10 shows, from the sequence of its 1,024 grey levels.

Of the authors' settings, see _base_/nystromformer.py: batches of 256, 35,000 iterations with 175 of warm-up.
"""

_base_ = "_base_/nystromformer.py"

length = 1024
model = dict(encoder=dict(module=dict(vocab_size=257, length=length)), num_classes=10)

dataset = dict(type="GreyCifar10", data_root="{{$LRA_DATA:data}}/cifar-10-batches-py", length=length)
train_dataloader = dict(batch_size=256, dataset=dataset)
val_dataloader = dict(batch_size=256, dataset=dataset)
test_dataloader = dict(batch_size=256, dataset=dataset)

iterations, warm_up = 35000, 175
train_cfg = dict(max_iters=iterations, val_interval=iterations // 20)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.04, by_epoch=False, end=warm_up),
    dict(type="LinearLR", start_factor=1.0, end_factor=0.0, by_epoch=False, begin=warm_up, end=iterations),
]
default_hooks = dict(checkpoint=dict(interval=iterations // 20))
