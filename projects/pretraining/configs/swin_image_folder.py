"""A small Swin with preconditioned attention (the default) on a folder of images with a subfolder for each class.

The environment variable IMAGE_FOLDER (default: data/images) names the folder, which has the images in train/CLASS/ and
val/CLASS/. The number of classes follows from it. Images are cropped to 96 x 96 pixels, the size of configs/demo.
"""

_base_ = "swin_fashion_mnist.py"

from condattn.openmmlab.datasets.image_folders import class_names  # noqa: E402

data_root = "{{$IMAGE_FOLDER:data/images}}"
classes = class_names(data_root, "the environment variable IMAGE_FOLDER")

model = dict(
    data_preprocessor=dict(num_classes=len(classes)),
    backbone=dict(module=dict(img_size=96)),
    head=dict(num_classes=len(classes)),
)

images = dict(_delete_=True, type="CustomDataset", data_root=data_root, metainfo=dict(classes=classes))
evaluation = dict(
    **images,
    data_prefix="val",
    test_mode=True,
    pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="ResizeEdge", scale=110, edge="short"),
        dict(type="CenterCrop", crop_size=96),
        dict(type="PackInputs"),
    ],
)
train_dataloader = dict(
    num_workers=1,
    persistent_workers=True,
    dataset=dict(
        **images,
        data_prefix="train",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="RandomResizedCrop", scale=96),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackInputs"),
        ],
    ),
)
val_dataloader = dict(dataset=evaluation)
test_dataloader = dict(dataset=evaluation)
