"""Mask R-CNN with a small Swin on the built-in digit scenes, a study that needs no external data."""

_base_ = ["_base_/methods.py", "_base_/mask_rcnn_swin_t.py"]
config = "_base_/mask_rcnn_digit_scenes.py"
title = "Does conditioning a small Swin help Mask R-CNN to segment handwritten digits on photographs?"
metric = "coco/segm_mAP"
factor = 100.0
unit = "points of mask AP"
tuning = dict(option="optim_wrapper.optimizer.lr", grid=[5e-4, 1e-3, 2e-3], seeds=[101, 102])
sizes = dict(
    gpu={
        "model.backbone.window_size": 8,
        "train_dataloader.dataset.pipeline.2.scale": (512, 512),
        "val_dataloader.dataset.pipeline.1.scale": (512, 512),
        "test_dataloader.dataset.pipeline.1.scale": (512, 512),
        "train_cfg.max_iters": 6000,
        "param_scheduler.1.T_max": 6000,
    },
)
