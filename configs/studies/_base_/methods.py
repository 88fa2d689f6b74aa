"""Settings of a study that compares PC and SC (strength 1) with no conditioning, with eight seeds."""

key = "model.backbone.conditioning"
variants = {
    "none": {key: "none"},
    "pc": {key: "pc"},
    "sc": {key: dict(type="SpectralCorrection", strength=1.0)},
}
del key
baseline = "none"
families = dict(methods=[("pc", "none"), ("sc", "none")])
difference = 1.0
pilot_seeds = [201, 202, 203, 204]
seeds = list(range(8))
