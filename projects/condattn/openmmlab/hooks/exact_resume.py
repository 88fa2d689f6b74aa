"""Make a resumed training continue with the random numbers of an uninterrupted one."""

import hashlib
import random
from functools import partial

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

from .atomic_checkpoint import VALIDATED, WITHIN_EPOCH
from .schedule import is_validated


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Make a resumed run continue bit for bit like an uninterrupted one: random numbers depend on the position only.

    Python, numpy, torch and the data loader's workers are seeded anew before each epoch, or in an iteration-based run
    after each checkpoint, with a number computed from the seed of the run, the rank and the position. Iteration-based
    runs need a sampler that can skip ahead, as ``InfiniteSampler`` of the default stack can; others are not reseeded.

    A checkpoint is saved before the validation of its position, and mmengine skips this validation in a run that
    resumes from it. This hook makes up for it, so that no result is missing from the log, from the choice of the best
    checkpoint, and from schedules that depend on results.

    mmengine cannot resume within an epoch: the epoch begins anew, and a warning says so.

    Args:
        validate: Whether a resumed run begins with the validation of its position, unless the checkpoint was saved
            after it.
    """

    priority = "LOWEST"

    def __init__(self, validate: bool = True) -> None:
        self.validate = validate
        self._newest: str | None = None
        self._validation_missing = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note whether a run resumes from a checkpoint that was saved before a validation, or within an epoch."""
        meta = checkpoint.get("meta", {}) if getattr(runner, "_resume", False) else {VALIDATED: True}
        within = meta.get(WITHIN_EPOCH, False)
        self._validation_missing = not (within or meta.get(VALIDATED, False))
        if within:
            runner.logger.warning(
                f"the checkpoint was saved within epoch {meta['epoch'] + 1}, after iteration {meta['iter']}; that "
                "epoch begins anew, while schedules go on from there, so that this is not the uninterrupted training; "
                "resume from a checkpoint at the end of an epoch where there is one"
            )

    def before_train(self, runner: Runner) -> None:
        """Do the validation that the checkpoint was saved before."""
        loop = runner.train_loop
        in_epochs = isinstance(loop, EpochBasedTrainLoop)
        if not in_epochs and not self._can_skip(runner):
            runner.logger.info("a resumed run will see other batches than this one: the sampler cannot skip iterations")
        if getattr(runner.optim_wrapper, "_accumulative_counts", 1) > 1:
            runner.logger.info(
                "gradients are accumulated; a run that resumes from a checkpoint between two updates loses those of "
                "the iterations since the last update"
            )
        position, last = (loop.epoch, loop.max_epochs) if in_epochs else (loop.iter, loop.max_iters)
        missing, self._validation_missing = self._validation_missing, False
        if not (self.validate and missing and position > 0 and runner.val_loop is not None):
            return
        if is_validated(loop, position, last):
            unit = "epoch" if in_epochs else "iteration"
            runner.logger.info(
                f"the checkpoint was saved before the validation of {unit} {position}, which follows now"
            )
            runner.val_loop.run()

    def before_train_epoch(self, runner: Runner) -> None:
        """Reseed at the start of an epoch, or of an iteration-based run, new or resumed."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._reseed(runner, runner.epoch)
        elif self._can_skip(runner):
            self._reseed(runner, runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Remember the path of the newest checkpoint, which all processes know even if only rank 0 saves."""
        self._newest = runner.message_hub.runtime_info.get("last_ckpt")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Reseed after a checkpoint of an iteration-based run, as a run that resumes from it does."""
        self._reseed_after_checkpoint(runner, runner.iter + 1)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Reseed after a validation that follows a checkpoint or saves one: a resumed run does not repeat it."""
        self._reseed_after_checkpoint(runner, runner.iter)

    def _reseed_after_checkpoint(self, runner: Runner, position: int) -> None:
        """Reseed, and restart the data loader at ``position``, if a checkpoint was saved in this iteration."""
        loop = runner.train_loop
        saved = runner.message_hub.runtime_info.get("last_ckpt") != self._newest
        if saved and not isinstance(loop, EpochBasedTrainLoop) and self._can_skip(runner):
            self._reseed(runner, position)
            loop.dataloader_iterator._iterator = None
            loop.dataloader_iterator.skip_iter(position)

    def _can_skip(self, runner: Runner) -> bool:
        """Whether the data loader of an iteration-based run can skip to a position."""
        iterator = getattr(runner.train_loop, "dataloader_iterator", None)
        return hasattr(iterator, "skip_iter") and hasattr(runner.train_dataloader.sampler, "skip")

    def _reseed(self, runner: Runner, position: int) -> None:
        text = f"{runner.seed} {get_rank()} {position}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") // 2
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        loader = runner.train_dataloader
        if isinstance(loader.worker_init_fn, partial) and "seed" in loader.worker_init_fn.keywords:
            loader.worker_init_fn = partial(loader.worker_init_fn, seed=seed)
        loader._iterator = None  # persistent workers would keep their random state
