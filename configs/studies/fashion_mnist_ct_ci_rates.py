"""A small ViT on Fashion-MNIST: conditioned tokens and initialisation against the baseline with its own learning rate.

In ``fashion_mnist_ct_ci`` three of the five variants have conditioned initialisation, and are best with a lower rate
than the baseline, which they therefore determine for the baseline too. Here the baseline has the rate that the tuning
of ``fashion_mnist`` chose, and the others those of ``fashion_mnist_ct_ci``. All trainings are those of the two studies.
Defined before the second one was complete.
"""

_base_ = "fashion_mnist_ct_ci.py"
title = "Do conditioned tokens or initialisation help, compared with a baseline that has its own learning rate?"

key = "model.backbone.conditioning"
rate = "optim_wrapper.optimizer.lr"
variants = {
    "_delete_": True,
    "none": {key: "none", rate: 2e-3},
    "ct": {key: "ct", rate: 4e-3},
    "ci": {key: "ci", rate: 1e-3},
    "ci+pc": {key: "ci+pc", rate: 1e-3},
    "ci+sc": {key: "ci+sc", rate: 1e-3},
}
tuning = dict(option=rate, grid=[2e-3], seeds=[])
del key, rate
families = dict(_delete_=True, rates=[("ct", "none"), ("ci", "none"), ("ci+pc", "none"), ("ci+sc", "none")])
exploratory = True
