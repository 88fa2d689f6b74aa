"""Mask R-CNN with a small Swin on nuclei, fine-tuned from weights that were pretrained without conditioning.

sc_effective starts from the function and the gradients of none, and differs from it in what the weight decay pulls the
weights towards alone: its difference shows how much two nearly equal trainings differ.
"""

_base_ = "nuclei_swin.py"
title = "Exploratory: does conditioning help to fine-tune a pretrained Swin in Mask R-CNN to segment nuclei?"
exploratory = True
start = dict(
    checkpoint="work_dirs/pretraining/{seed}/iter_400.pth",
    command="python tools/train.py projects/pretraining/configs/swin_fashion_mnist.py --work-dir "
    "work_dirs/pretraining/{seed} --cfg-options model.backbone.conditioning=none randomness.seed={seed}",
)
options = {"model.backbone.init_cfg": dict(type="Pretrained", checkpoint="{start}")}

key = "model.backbone.conditioning"
spectra = dict(type="SpectraHook")
variants = {
    "_delete_": True,
    "none": {key: "none"},
    "pc": {key: "pc"},
    "pc_calibrated": {key: "pc", "custom_hooks": [spectra, dict(type="CalibrationHook", batches=8)]},
    "sc_effective": {
        key: dict(type="SpectralCorrection", strength=1.0),
        "model.backbone.init_cfg": dict(type="Pretrained", checkpoint="{start}", load="effective"),
    },
}
del key, spectra
families = dict(_delete_=True, methods=[("pc", "none"), ("pc_calibrated", "none"), ("sc_effective", "none")])
sizes = dict(_delete_=True, cpu={})  # the pretrained checkpoints are of the small Swin
pilot_seeds = [201, 202]
seeds = list(range(5))
