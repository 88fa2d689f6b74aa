"""Calibrate a preconditioned model before its first iteration."""

from itertools import islice

import torch
from mmengine import dist
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ...methods import HeadOutputMethod
from ...spectra.measure import unchanged
from ...weights.calibrate import calibrate
from ..models.forward import forward, learner, prepare
from ..models.loading import methods_in, recorded, trained_with
from ..models.wrapping import unwrapped


@HOOKS.register_module()
class CalibrationHook(Hook):
    """Multiply the output projections by the mean row norms of pretrained attention before the training starts.

    For weights that were trained without a preconditioner; see :func:`condattn.weights.calibrate.calibrate`. A
    resumed run is not calibrated, nor are weights whose checkpoint records a preconditioner. In a distributed run each
    process measures its part of the data, and all use the mean over the processes. The training then sees the same
    batches as without the hook. Of a semi-supervised model the student is calibrated, on images with annotations.

    Args:
        batches: Number of batches that are measured, of training images in random order.
    """

    priority = "ABOVE_NORMAL"  # before MeanTeacherHook, which copies the weights of the student to the teacher

    def __init__(self, batches: int = 8) -> None:
        if batches < 1:
            raise ValueError(f"CalibrationHook: batches is {batches}; expected at least 1")
        self.batches = batches
        self._loaded: list[str] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note with which preconditioners the weights were trained that the run starts from."""
        self._loaded = methods_in(recorded(checkpoint), HeadOutputMethod)

    def before_train(self, runner: Runner) -> None:
        """Calibrate the model, and log the effect on each site."""
        if runner.iter > 0:
            return
        model = unwrapped(runner.model)
        # A checkpoint replaces the weights that the model was built with, and their record.
        methods = trained_with(model, HeadOutputMethod) if self._loaded is None else self._loaded
        if methods:
            runner.logger.info(f"CalibrationHook leaves weights alone that were trained with {', '.join(methods)}")
            return
        with unchanged(model):
            samples = islice(_apart(runner.train_dataloader, runner.seed), self.batches)
            batches = [prepare(model, sample, training=True) for sample in samples]

            def run() -> None:
                with torch.random.fork_rng():
                    for batch in batches:
                        forward(model, batch)

            sites = calibrate(learner(model), run, reduce=_mean)
        for site in sites:
            runner.logger.info(site)


def _apart(loader: DataLoader, seed: int) -> DataLoader:
    """A loader of the same data with a sampler of its own: samplers without an end have a position, which is kept."""
    size = getattr(loader.batch_sampler, "batch_size", 1)
    return DataLoader(
        loader.dataset, size, sampler=DefaultSampler(loader.dataset, seed=seed), collate_fn=loader.collate_fn
    )


def _mean(value: torch.Tensor) -> torch.Tensor:
    """Average ``value`` over all processes, in place."""
    dist.all_reduce(value, op="mean")
    return value
