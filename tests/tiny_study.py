"""A study of a very small ViT on random images, and records of its runs."""

import gzip
import struct
from pathlib import Path

import numpy as np

from condattn.openmmlab.study.plan import FINAL, RunId, planned_runs
from condattn.openmmlab.study.results import Record, Results

TINY = """
config = "_base_/vit_fashion_mnist.py"
title = "Does a tiny study run?"
data = dict(variable="FASHION_MNIST", default="data", source="the test writes them")
options = {
    "model.backbone.module.arch": dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16),
    "model.head.in_channels": 16,
    "train_dataloader.batch_size": 4,
    "val_dataloader.dataset.held_out": True,
    "train_cfg.max_iters": 4,
    "param_scheduler.0.end": 1,
    "param_scheduler.1.T_max": 4,
    "custom_hooks": [dict(type="SpectraHook")],
}
metric = "accuracy/top1"
unit = "points"
difference = 5.0
variants = dict(none={"model.backbone.conditioning": "none"}, pc={"model.backbone.conditioning": "pc"})
baseline = "none"
families = dict(methods=[("pc", "none")])
pilot_seeds = [7, 8]
tuning = dict(option="optim_wrapper.optimizer.lr", grid=[1e-4, 1e-3], seeds=[5, 6], largest_grid=2)
seeds = [0, 1]
evaluations = 2
"""


def write_images(folder: Path, number: int = 60, seed: int = 0) -> Path:
    """Write random images and labels in the format of Fashion-MNIST; one of the files is compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (number, 28, 28), np.uint8), rng.integers(0, 10, number, np.uint8)
        header = struct.pack(">4B3I", 0, 0, 8, 3, number, 28, 28)
        with gzip.open(folder / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(header + images.tobytes())
        labels_file = folder / f"{name}-labels-idx1-ubyte"
        labels_file.write_bytes(struct.pack(">4BI", 0, 0, 8, 1, number) + labels.tobytes())
    return folder


def a_record(run: RunId, score: float, **values) -> Record:
    status = values.pop("status", "finished")
    reported = {"accuracy/top1": score + 1} if run.stage == FINAL and status == "finished" else {}
    return Record(run, status, score, reported, [[2, score - 1], [4, score]], **values)


def add_at_once(results: Results, runs: list[RunId], barrier) -> None:
    """Add records of runs, with their seeds as scores, as soon as other processes wait at the barrier too."""
    barrier.wait()
    for run in runs:
        results.add(a_record(run, float(run.seed)))


def finish(results: Results, scores: dict) -> None:
    """Add every run that the study needs."""
    while missing := [r for r in planned_runs(results.study, results.scores()) if r not in results.scores()]:
        for one in missing:
            rate, seed = (1.0 if one.rate == 1e-3 else 0.0), (2.0 * one.seed if one.variant == "pc" else 0.0)
            results.add(a_record(one, scores[one.variant] + rate + seed, commit="abc"))
