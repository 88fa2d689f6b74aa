"""UPerNet with a small Swin on street scenes (CamVid, 11 classes): 367 training, 101 tuning and 233 test images."""

_base_ = "_base_/methods.py"
config = "_base_/upernet_camvid.py"
title = "Does conditioning a small Swin help UPerNet to segment street scenes?"
data = dict(
    variable="CAMVID",
    default="data/camvid",
    source="expected a folder with images/ and annotations/, each with train, val and test",
)
metric = "mIoU"
unit = "points of mIoU"
tuning = dict(option="optim_wrapper.optimizer.lr", grid=[1e-3, 2e-3, 4e-3], seeds=[101, 102])
sizes = dict(
    cpu={},
    gpu={
        "model.backbone.embed_dims": 96,
        "model.backbone.depths": (2, 2, 6, 2),
        "model.backbone.num_heads": (3, 6, 12, 24),
        "model.backbone.strides": (4, 2, 2, 2),
        "model.backbone.out_indices": (0, 1, 2, 3),
        "model.decode_head.in_channels": [96, 192, 384, 768],
        "model.decode_head.in_index": [0, 1, 2, 3],
        "model.data_preprocessor.size": (512, 512),
        "train_dataloader.dataset.pipeline.2.scale": (960, 720),
        "train_dataloader.dataset.pipeline.3.crop_size": (512, 512),
        "val_dataloader.dataset.pipeline.1.scale": (960, 720),
        "test_dataloader.dataset.pipeline.1.scale": (960, 720),
        "train_cfg.max_iters": 8000,
        "param_scheduler.1.T_max": 8000,
    },
)
