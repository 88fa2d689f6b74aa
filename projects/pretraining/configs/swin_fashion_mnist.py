"""A small Swin with preconditioned attention (the default) on Fashion-MNIST, in minutes on one CPU core.

The backbone is that of configs/demo, so that its weights start the demo detector and the demo segmenter; grey images
become three equal channels. Data, optimizer and hooks are those of configs/studies/_base_/vit_fashion_mnist.py: four
fifths of the training images train, the rest is the validation data, and the test images are left for tools/test.py.
"""

_base_ = "../../../configs/studies/_base_/vit_fashion_mnist.py"

model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    backbone=dict(
        conditioning="pc",
        module=dict(
            _delete_=True,
            type="SwinTransformer",
            arch=dict(embed_dims=32, depths=[2, 2, 2], num_heads=[2, 4, 8]),
            img_size=48,
            window_size=6,
            out_indices=(2,),
            drop_path_rate=0.0,
            pad_small_map=True,  # as detection and segmentation do: any image size, windows of one size
        ),
    ),
    neck=dict(_delete_=True, type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", in_channels=128),
)

colour = [
    dict(type="NumpyToPIL"),
    dict(type="torchvision/Grayscale", num_output_channels=3),
    dict(type="PILToNumpy"),
    dict(type="Resize", scale=(48, 48)),
]
evaluation = [*colour, dict(type="PackInputs")]
train_dataloader = dict(
    dataset=dict(pipeline=[*colour, dict(type="RandomFlip", prob=0.5), dict(type="PackInputs")]),
)
val_dataloader = dict(dataset=dict(pipeline=evaluation))
test_dataloader = dict(dataset=dict(pipeline=evaluation))

iterations = 400
train_cfg = dict(max_iters=iterations, val_interval=iterations)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=100),
    dict(type="CosineAnnealingLR", by_epoch=False, T_max=iterations),
]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=iterations // 2))
