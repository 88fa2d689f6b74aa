"""A small ViT on Fashion-MNIST: 60,000 real images of ten kinds of clothes."""

config = "_base_/vit_fashion_mnist.py"
title = "Does conditioning the attention of a small ViT help to classify Fashion-MNIST?"
data = dict(
    variable="FASHION_MNIST",
    default="/usr/share/datasets/fashion-mnist",
    source="Debian's package dataset-fashion-mnist has the data, or any folder with the four files of the release",
)
metric = "accuracy/top1"
unit = "points of accuracy"
difference = 0.5

key = "model.backbone.conditioning"
variants = {
    "none": {key: "none"},
    "pc": {key: "pc"},
    "sc": {key: dict(type="SpectralCorrection", strength=1.0)},
    "pc_detached": {key: dict(type="RowPreconditioner", detach=True)},
    "sc_per_head": {key: dict(type="SpectralCorrection", strength=1.0, layout="per_head")},
    "sc_0.3": {key: dict(type="SpectralCorrection", strength=0.3)},
    "sc_3": {key: dict(type="SpectralCorrection", strength=3.0)},
    "sc_10": {key: dict(type="SpectralCorrection", strength=10.0)},
    "sc_relative": {key: dict(type="SpectralCorrection", strength=3.0, relative=True)},
    "sc_v": {key: dict(type="SpectralCorrection", strength=1.0, targets=("v",))},
    "sc_qk": {key: dict(type="SpectralCorrection", strength=1.0, targets=("q", "k"))},
    "sc+pc": {key: [dict(type="SpectralCorrection", strength=1.0), dict(type="RowPreconditioner")]},
}
del key
baseline = "none"
families = dict(
    methods=[("pc", "none"), ("sc", "none")],
    gradient=[("pc_detached", "pc")],
    layout=[("sc_per_head", "sc")],
    strength=[("sc_0.3", "none"), ("sc_3", "none"), ("sc_10", "none"), ("sc_relative", "none")],
    targets=[("sc_v", "none"), ("sc_qk", "none")],
    both=[("sc+pc", "none")],
)
pilot_seeds = [201, 202, 203, 204]
tuning = dict(option="optim_wrapper.optimizer.lr", grid=[1e-3, 2e-3, 4e-3], seeds=[101, 102])
seeds = list(range(10))
sizes = dict(
    cpu={},
    gpu={
        "model.backbone.module.arch": dict(embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536),
        "model.head.in_channels": 384,
        "train_cfg.max_iters": 15000,
        "param_scheduler.1.T_max": 15000,
    },
)
