"""UPerNet with a small Swin on street scenes: is the effect of PC one of the learning rate?

In the tuning of ``camvid_swin``, the baseline was best with 0.001, and the rule for rates trained it with 0.002, with
which PC was best. Here the methods are compared with the baseline at its own rate.
"""

_base_ = "camvid_swin.py"
title = "Is the effect of conditioning a small Swin that segments street scenes one of the learning rate?"

key, rate = "model.backbone.conditioning", "optim_wrapper.optimizer.lr"
variants = {
    "_delete_": True,
    "none": {key: "none"},
    "pc": {key: "pc"},
    "sc": {key: dict(type="SpectralCorrection", strength=1.0)},
    "none_0.001": {key: "none", rate: 1e-3},
    "pc_0.001": {key: "pc", rate: 1e-3},
}
tuning = dict(option=rate, grid=[2e-3], seeds=[])
del key, rate
families = dict(
    _delete_=True,
    rates=[("pc", "none_0.001"), ("sc", "none_0.001")],
    baseline=[("none_0.001", "none")],
    equal=[("pc_0.001", "none_0.001")],
)
exploratory = True
