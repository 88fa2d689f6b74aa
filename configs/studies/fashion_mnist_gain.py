"""A small ViT on Fashion-MNIST: does a gain after the preconditioner help?"""

_base_ = "fashion_mnist.py"
title = "Does a gain behind the preconditioner help a small ViT to classify Fashion-MNIST?"

key = "model.backbone.conditioning"
variants = {
    "_delete_": True,
    "pc": {key: "pc"},
    "pc_sqrt": {key: dict(type="GainedRowPreconditioner", gain="sqrt")},
    "pc_initial": {key: dict(type="GainedRowPreconditioner", gain="initial")},
    "pc_learned": {key: dict(type="GainedRowPreconditioner", gain="learned")},
}
del key
baseline = "pc"
families = dict(_delete_=True, gain=[("pc_sqrt", "pc"), ("pc_initial", "pc"), ("pc_learned", "pc")])
