"""Nystromformer on the Long Range Arena: model, optimizer and loaders, which each task completes.

The settings are those of the Nystromformer authors' Long Range Arena: 2 layers of 64 channels, 2 heads, 128 hidden
channels, a convolution of 35 tokens, dropout of 0.1, AdamW with a learning rate of 1e-4 without weight decay, linear
warm-up from a 25th and linear decay. They configure 32 to 256 landmarks; our choice are 128, clipped gradients and
evaluations at every twentieth part of the training. Hugging Face's model normalises behind its residual connections,
theirs in front of them.
"""

default_scope = "mmengine"
custom_imports = dict(imports=["condattn.registry", "long_range_arena.registry"], allow_failed_imports=False)

model = dict(
    type="SequenceClassifier",
    encoder=dict(
        type="Conditioned",
        conditioning="pc",
        module=dict(
            type="Nystromformer",
            num_landmarks=128,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            conv_kernel_size=35,
        ),
    ),
    hidden_channels=128,
)

train_dataloader = dict(
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(split="train"),
)
val_dataloader = dict(
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(split="val", test_mode=True),
)
test_dataloader = dict(
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(split="test", test_mode=True),
)
val_evaluator = dict(type="SequenceAccuracy")
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop")
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, eps=1e-6, weight_decay=0.0),
    clip_grad=dict(max_norm=1.0),
)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, max_keep_ckpts=1, save_best="accuracy/top1"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
log_processor = dict(by_epoch=False)
env_cfg = dict(cudnn_benchmark=False)
randomness = dict(seed=0)
