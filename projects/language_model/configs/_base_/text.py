"""A text, split by position into training (80 %), validation (10 %) and test (10 %), and how models are trained on it.

The text is a file, or a folder of .txt files, that the environment variable LANGUAGE_MODEL_TEXT names, or else the
built-in text.
"""

default_scope = "mmengine"
custom_imports = dict(imports=["condattn.registry", "language_model"], allow_failed_imports=False)

length = 128
path = "{{$LANGUAGE_MODEL_TEXT:pydoc_data.topics}}"
collate = dict(type="default_collate")
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    collate_fn=collate,
    dataset=dict(type="ByteSequences", part="train", path=path, length=length, stride=length // 4),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=collate,
    # Of a long text, evenly spaced sequences: all of its tenth would take longer than the training.
    dataset=dict(type="ByteSequences", part="validation", path=path, length=length, max_sequences=2000),
)
test_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=collate,
    dataset=dict(type="ByteSequences", part="test", path=path, length=length),
)

iterations = 1200
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations // 10)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05),
    # The embedding is the output layer as well.
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, bypass_duplicate=True),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=100),
    dict(type="CosineAnnealingLR", by_epoch=False, T_max=iterations),
]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=iterations // 10, max_keep_ckpts=1),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [dict(type="SpectraHook", interval=iterations // 10)]
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
log_processor = dict(by_epoch=False)
env_cfg = dict(cudnn_benchmark=False)
randomness = dict(seed=0)
