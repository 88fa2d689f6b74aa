"""Mask R-CNN with a small XCiT, the backbone of the papers' COCO tables, on nuclei; SC has their strength 10."""

_base_ = "nuclei_swin.py"
config = "_base_/mask_rcnn_nuclei_xcit.py"
title = "Does conditioning a small XCiT help Mask R-CNN to segment nuclei?"
key = "model.backbone.conditioning"
variants = {
    "_delete_": True,
    "none": {key: "none"},
    "pc": {key: "pc"},
    "sc_10": {key: dict(type="SpectralCorrection", strength=10.0)},
}
del key
families = dict(_delete_=True, methods=[("pc", "none"), ("sc_10", "none")])
sizes = dict(
    gpu={
        "_delete_": True,
        "model.backbone.model_name": "xcit_small_12_p8_224",
        "model.backbone.embed_dim": 384,
        "model.backbone.depth": 12,
        "model.backbone.num_heads": 8,
        "model.backbone.out_indices": (3, 5, 7, 11),
        "model.neck.0.embed_dim": 384,
        "model.neck.1.in_channels": [384, 384, 384, 384],
        "train_dataloader.dataset.pipeline.2.scale": (640, 640),
        "val_dataloader.dataset.pipeline.1.scale": (640, 640),
        "test_dataloader.dataset.pipeline.1.scale": (640, 640),
        "train_dataloader.dataset.pipeline.3.crop_size": (512, 512),
        "train_cfg.max_iters": 4000,
        "param_scheduler.1.T_max": 4000,
    },
)
