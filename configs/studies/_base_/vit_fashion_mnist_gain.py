"""The small ViT on Fashion-MNIST, for preconditioners with a gain."""

_base_ = "vit_fashion_mnist.py"
custom_imports = dict(imports=["condattn.registry", "condattn.openmmlab.study.gain"], allow_failed_imports=False)
