"""A small ViT on Fashion-MNIST: what do the settings of PC and SC do?"""

_base_ = "fashion_mnist.py"
title = "Which settings of PC and SC matter for a small ViT that classifies Fashion-MNIST?"

key = "model.backbone.conditioning"
variants = {
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
families = dict(
    _delete_=True,
    gradient=[("pc_detached", "pc")],
    layout=[("sc_per_head", "sc")],
    strength=[("sc_0.3", "none"), ("sc_3", "none"), ("sc_10", "none"), ("sc_relative", "none")],
    targets=[("sc_v", "none"), ("sc_qk", "none")],
    both=[("sc+pc", "none")],
)
