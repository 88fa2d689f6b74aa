"""Mask R-CNN with a small XCiT, the backbone of the papers' COCO tables, on nuclei; SC is their literal 10."""

config = "_base_/mask_rcnn_nuclei_xcit.py"
title = "Does conditioning a small XCiT help Mask R-CNN to segment nuclei?"
data = dict(
    variable="NUCLEI",
    default="data/nuclei",
    source="expected a folder with annotations/instances_train.json, annotations/instances_val.json and images/",
)
metric = "coco/segm_mAP"
factor = 100.0
unit = "points of mask AP"
difference = 1.0

key = "model.backbone.conditioning"
variants = {
    "none": {key: "none"},
    "pc": {key: "pc"},
    "sc": {key: dict(type="SpectralCorrection", strength=10.0)},
}
del key
baseline = "none"
families = dict(methods=[("pc", "none"), ("sc", "none")])
pilot_seeds = [201, 202, 203, 204]
tuning = dict(option="optim_wrapper.optimizer.lr", grid=[5e-4, 1e-3, 2e-3], seeds=[101, 102])
seeds = list(range(8))
sizes = dict(
    cpu={},
    gpu={
        "model.backbone.model_name": "xcit_small_12_p8_224",
        "model.backbone.embed_dim": 384,
        "model.backbone.depth": 12,
        "model.backbone.num_heads": 8,
        "model.backbone.out_indices": (3, 7, 11),
        "model.neck.0.embed_dim": 384,
        "model.neck.1.in_channels": [384, 384, 384],
        "train_dataloader.dataset.pipeline.2.scale": (512, 512),
        "train_dataloader.dataset.pipeline.3.crop_size": (256, 256),
        "train_cfg.max_iters": 4000,
        "param_scheduler.1.T_max": 4000,
    },
)
