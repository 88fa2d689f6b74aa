"""A small ViT on Fashion-MNIST: is another setting of SC better than the default, strength 1 on q, k and v?

The trainings are those of ``fashion_mnist_ablations``, which compares the settings with no conditioning.
"""

_base_ = "fashion_mnist_ablations.py"
title = "Is another strength or another target of SC better than the default for a small ViT on Fashion-MNIST?"
families = dict(
    _delete_=True,
    strength=[("sc_0.3", "sc"), ("sc_3", "sc"), ("sc_10", "sc"), ("sc_relative", "sc")],
    targets=[("sc_v", "sc"), ("sc_qk", "sc")],
)
