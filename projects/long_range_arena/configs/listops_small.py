"""A small ListOps, which a CPU begins to learn in minutes: expressions of 50 to 127 tokens, with a depth of up to 5.

Generate it with: python -m long_range_arena.generate data/listops_small --train 60000 --val 1000 --max-depth 5
--min-length 49 --max-length 128. All settings are our choice.
"""

_base_ = "_base_/nystromformer.py"

length = 128
model = dict(
    encoder=dict(
        conditioning="none",
        module=dict(
            vocab_size=16,
            length=length,
            num_landmarks=32,
            initializer_range=0.1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
    ),
    num_classes=10,
)

dataset = dict(type="ListOps", data_root="{{$LISTOPS_SMALL:data/listops_small}}", length=length)
train_dataloader = dict(batch_size=32, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(batch_size=200, num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = dict(batch_size=200, num_workers=0, persistent_workers=False, dataset=dataset)

iterations = 5000
train_cfg = dict(max_iters=iterations, val_interval=iterations // 10)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=100),
    dict(type="CosineAnnealingLR", by_epoch=False, T_max=iterations),
]
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(_delete_=True, type="CheckpointHook", by_epoch=False, interval=iterations // 10, max_keep_ckpts=1),
)
custom_hooks = [dict(type="SpectraHook", interval=iterations // 10)]
