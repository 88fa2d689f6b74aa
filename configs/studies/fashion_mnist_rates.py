"""A small ViT on Fashion-MNIST: is the effect of PC one of the learning rate?

In the tuning of ``fashion_mnist``, PC was best with the lowest rate of the grid, and the rule for rates trained it with
the baseline's. Here PC is trained with lower rates, and compared with the baseline at the baseline's own rate.
"""

_base_ = "fashion_mnist.py"
title = "Is the effect of PC on a small ViT that classifies Fashion-MNIST one of the learning rate?"

key = "model.backbone.conditioning"
rate = "optim_wrapper.optimizer.lr"
variants = {
    "_delete_": True,
    "none": {key: "none"},
    "none_0.001": {key: "none", rate: 1e-3},
    "pc_0.001": {key: "pc", rate: 1e-3},
    "pc_0.0005": {key: "pc", rate: 5e-4},
    "pc_initial_0.001": {key: dict(type="GainedRowPreconditioner", gain="initial"), rate: 1e-3},
}
tuning = dict(option=rate, grid=[2e-3], seeds=[])
del key, rate
families = dict(
    _delete_=True,
    rates=[("pc_0.001", "none"), ("pc_0.0005", "none")],
    baseline=[("none_0.001", "none")],
    equal=[("pc_0.001", "none_0.001")],
    gain=[("pc_initial_0.001", "none")],
)
exploratory = True
