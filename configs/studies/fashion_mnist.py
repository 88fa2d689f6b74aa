"""A small ViT on Fashion-MNIST: 60,000 real images of ten kinds of clothes."""

_base_ = "_base_/methods.py"
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
tuning = dict(option="optim_wrapper.optimizer.lr", grid=[1e-3, 2e-3, 4e-3], seeds=[101, 102])
seeds = list(range(10))
sizes = dict(
    cpu={},
    gpu={
        "model.backbone.module.arch": dict(embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=3072),
        "model.head.in_channels": 768,
        "train_cfg.max_iters": 15000,
        "param_scheduler.1.T_max": 15000,
    },
)
