"""Mask R-CNN with a small Swin on nuclei in microscopy images: 535 for training and tuning, 129 for evaluation."""

_base_ = "_base_/methods.py"
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
    cpu={},
    gpu={
        "model.backbone.embed_dims": 96,
        "model.backbone.depths": (2, 2, 6, 2),
        "model.backbone.num_heads": (3, 6, 12, 24),
        "model.backbone.strides": (4, 2, 2, 2),
        "model.backbone.out_indices": (0, 1, 2, 3),
        "model.neck.in_channels": [96, 192, 384, 768],
        "model.neck.num_outs": 4,
        "model.rpn_head.anchor_generator.strides": [4, 8, 16, 32],
        "model.roi_head.bbox_roi_extractor.featmap_strides": [4, 8, 16, 32],
        "model.roi_head.mask_roi_extractor.featmap_strides": [4, 8, 16, 32],
        "train_dataloader.dataset.pipeline.2.scale": (640, 640),
        "val_dataloader.dataset.pipeline.1.scale": (640, 640),
        "test_dataloader.dataset.pipeline.1.scale": (640, 640),
        "train_dataloader.dataset.pipeline.3.crop_size": (512, 512),
        "train_cfg.max_iters": 4000,
        "param_scheduler.1.T_max": 4000,
    },
)
