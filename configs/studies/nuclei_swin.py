"""Mask R-CNN with a small Swin on nuclei in microscopy images: 535 for training and tuning, 129 for evaluation."""

_base_ = ["_base_/methods.py", "_base_/mask_rcnn_swin_t.py"]
config = "_base_/mask_rcnn_nuclei.py"
title = "Does conditioning a small Swin help Mask R-CNN to segment nuclei?"
data = dict(
    variable="NUCLEI",
    default="data/nuclei",
    source="expected a folder with annotations/instances_train.json, annotations/instances_val.json and images/",
)
metric = "coco/segm_mAP"
factor = 100.0
unit = "points of mask AP"
tuning = dict(option="optim_wrapper.optimizer.lr", grid=[5e-4, 1e-3, 2e-3], seeds=[101, 102])
sizes = dict(
    gpu={
        "train_dataloader.dataset.pipeline.2.scale": (640, 640),
        "val_dataloader.dataset.pipeline.1.scale": (640, 640),
        "test_dataloader.dataset.pipeline.1.scale": (640, 640),
        "train_dataloader.dataset.pipeline.3.crop_size": (512, 512),
        "train_cfg.max_iters": 4000,
        "param_scheduler.1.T_max": 4000,
    },
)
