"""Exploratory: a small GPT-2 style decoder on the built-in text of projects/language_model."""

config = "_base_/gpt2_text.py"
title = "Exploratory: does conditioning the attention of a small GPT-2 style decoder help it to predict the next byte?"
# Of a study, the higher score is the better one, and a failed run counts with its last score, or 0. The accuracy of the
# next byte, in percent, fits this; bits per byte, where less is better, are recorded beside it.
exploratory = True
metric = "next_byte/accuracy"
unit = "points of accuracy"
difference = 0.5

key = "model.network.conditioning"
variants = {
    "none": {key: "none"},
    "pc": {key: "pc"},
    "sc": {key: dict(type="SpectralCorrection", strength=1.0)},
}
del key
baseline = "none"
families = dict(methods=[("pc", "none"), ("sc", "none")])
pilot_seeds = [201, 202]
tuning = dict(option="optim_wrapper.optimizer.lr", grid=[1e-3, 2e-3, 4e-3], seeds=[101, 102])
seeds = list(range(5))
sizes = dict(
    cpu={},
    gpu={
        **{f"model.network.module.{name}": value for name, value in dict(n_embd=256, n_layer=6, n_head=8).items()},
        "train_cfg.max_iters": 3000,
        "param_scheduler.1.T_max": 3000,
    },
)
