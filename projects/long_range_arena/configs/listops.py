"""Nystromformer on ListOps: the value of an expression of up to 2,000 tokens.

Of the authors' settings, see _base_/nystromformer.py: batches of 32, 5,000 iterations with 1,000 of warm-up.
"""

_base_ = "_base_/nystromformer.py"

length = 2048
model = dict(encoder=dict(module=dict(vocab_size=16, length=length)), num_classes=10)

dataset = dict(type="ListOps", data_root="{{$LRA_DATA:data}}/lra_release/listops-1000", length=length)
train_dataloader = dict(batch_size=32, dataset=dataset)
val_dataloader = dict(batch_size=32, dataset=dataset)
test_dataloader = dict(batch_size=32, dataset=dataset)

iterations, warm_up = 5000, 1000
train_cfg = dict(max_iters=iterations, val_interval=iterations // 20)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.04, by_epoch=False, end=warm_up),
    dict(type="LinearLR", start_factor=1.0, end_factor=0.0, by_epoch=False, begin=warm_up, end=iterations),
]
default_hooks = dict(checkpoint=dict(interval=iterations // 20))
