"""A small ViT on Fashion-MNIST.

The environment variable FASHION_MNIST names the data folder; the default is that of Debian's package
dataset-fashion-mnist. Four fifths of the training images are used for training, the rest for tuning, and the test
images for the final evaluation.
"""

default_scope = "mmpretrain"
# The second module has the preconditioners with a gain, for fashion_mnist_gain.py.
custom_imports = dict(imports=["condattn.registry", "condattn.openmmlab.study.gain"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(type="ClsDataPreprocessor", mean=[72.9], std=[90.0], num_classes=10),
    backbone=dict(
        type="Conditioned",
        conditioning="none",
        module=dict(
            type="VisionTransformer",
            arch=dict(embed_dims=64, num_layers=4, num_heads=2, feedforward_channels=128),
            img_size=28,
            patch_size=4,
            in_channels=1,
        ),
    ),
    neck=None,
    head=dict(type="VisionTransformerClsHead", num_classes=10, in_channels=64, loss=dict(type="CrossEntropyLoss")),
)

root = "{{$FASHION_MNIST:/usr/share/datasets/fashion-mnist}}"
pack = dict(type="PackInputs")
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="IdxImages",
        data_root=root,
        split="training",
        held_out=False,
        pipeline=[dict(type="RandomFlip", prob=0.5), pack],
    ),
)
val_dataloader = dict(
    batch_size=500,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="IdxImages",
        data_root=root,
        split="training",
        held_out=True,
        test_mode=True,
        pipeline=[pack],
    ),
)
test_dataloader = dict(
    batch_size=500,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="IdxImages", data_root=root, split="test", test_mode=True, pipeline=[pack]),
)
val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator

iterations = 2000
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations // 10)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=100),
    dict(type="CosineAnnealingLR", by_epoch=False, T_max=iterations),
]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=100),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=iterations // 10, max_keep_ckpts=1),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [dict(type="SpectraHook", interval=iterations // 10)]
visualizer = dict(type="UniversalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
log_processor = dict(by_epoch=False)
env_cfg = dict(cudnn_benchmark=False)
randomness = dict(seed=0)
