"""A small ViT on Fashion-MNIST: do conditioned tokens and conditioned initialisation help?"""

_base_ = "fashion_mnist.py"
title = "Do conditioned tokens or conditioned initialisation help a small ViT to classify Fashion-MNIST?"

key = "model.backbone.conditioning"
variants = {
    "_delete_": True,
    "none": {key: "none"},
    "ct": {key: "ct"},
    "ci": {key: "ci"},
    "ci+pc": {key: "ci+pc"},
    "ci+sc": {key: "ci+sc"},
}
del key
families = dict(_delete_=True, methods=[("ct", "none"), ("ci", "none"), ("ci+pc", "none"), ("ci+sc", "none")])
