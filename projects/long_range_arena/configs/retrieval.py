"""Nystromformer on Retrieval: whether one of two papers cites the other, from the first 4,096 bytes of each.

Of the authors' settings, see _base_/nystromformer.py: batches of 32, 30,000 iterations with 800 of warm-up. They cut
texts off after 4,000 bytes and pad them to 4,096.
"""

_base_ = "_base_/nystromformer.py"

length = 4096
model = dict(encoder=dict(module=dict(vocab_size=257, length=length)), num_classes=2, pairs=True)

dataset = dict(type="AanPairs", data_root="{{$LRA_DATA:data}}/lra_release/tsv_data", length=length)
train_dataloader = dict(batch_size=32, dataset=dataset)
val_dataloader = dict(batch_size=32, dataset=dataset)
test_dataloader = dict(batch_size=32, dataset=dataset)

iterations, warm_up = 30000, 800
train_cfg = dict(max_iters=iterations, val_interval=iterations // 20)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.04, by_epoch=False, end=warm_up),
    dict(type="LinearLR", start_factor=1.0, end_factor=0.0, by_epoch=False, begin=warm_up, end=iterations),
]
default_hooks = dict(checkpoint=dict(interval=iterations // 20))
