"""A small Nystromformer on a small ListOps: 60,000 generated expressions of 50 to 127 tokens."""

config = "_base_/nystromformer_listops.py"
title = "Exploratory: does conditioning the attention of a small Nystromformer help to evaluate expressions (ListOps)?"
data = dict(
    variable="LISTOPS_SMALL",
    default="data/listops_small",
    source="generate the data with: python -m long_range_arena.generate data/listops_small --train 60000 --val 1000 "
    "--max-depth 5 --min-length 49 --max-length 128",
)
exploratory = True
metric = "accuracy/top1"
unit = "points of accuracy"
difference = 1.0

key = "model.encoder.conditioning"
variants = {
    "none": {key: "none"},
    "pc": {key: "pc"},
    "sc": {key: dict(type="SpectralCorrection", strength=1.0)},
}
del key
baseline = "none"
families = dict(methods=[("pc", "none"), ("sc", "none")])
pilot_seeds = [201, 202, 203, 204]
tuning = dict(option="optim_wrapper.optimizer.lr", grid=[5e-4, 1e-3, 2e-3], seeds=[101, 102])
seeds = list(range(5))
