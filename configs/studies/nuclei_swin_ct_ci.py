"""Mask R-CNN with a small Swin on nuclei: do conditioned tokens and conditioned initialisation help?

CT has fixed, higher rates as well, because it needed four times the common rate on Fashion-MNIST, and the tuning, whose
margin was 5 points of AP in nuclei_swin, could not tell.
"""

_base_ = "nuclei_swin.py"

title = "Do conditioned tokens or conditioned initialisation help Mask R-CNN with a small Swin to segment nuclei?"

key, rate = "model.backbone.conditioning", "optim_wrapper.optimizer.lr"
variants = {
    "_delete_": True,
    "none": {key: "none"},
    "ct": {key: "ct"},
    "ci": {key: "ci"},
    "ct_0.002": {key: "ct", rate: 2e-3},
    "ct_0.004": {key: "ct", rate: 4e-3},
}
del key, rate
families = dict(
    _delete_=True,
    methods=[("ct", "none"), ("ci", "none")],
    rates=[("ct_0.002", "none"), ("ct_0.004", "none")],
)
