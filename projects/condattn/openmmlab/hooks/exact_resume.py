"""Resume a training exactly where it was cut off."""

import hashlib
import random
from functools import partial

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Let a resumed run go on, bit for bit, as the uninterrupted one: its randomness depends on where it is alone.

    An epoch-based run draws new seeds (of Python, numpy, torch and the data loader's workers) before each epoch, an
    iteration-based run after each checkpoint, from the seed of the run, the rank and the position. Iteration-based runs
    need a sampler that can be forwarded, which ``InfiniteSampler`` of the default stack is; others are left alone.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self._newest: str | None = None

    def before_train_epoch(self, runner: Runner) -> None:
        """Begin an epoch, or, resumed, an iteration-based run."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._begin(runner, runner.epoch)
        elif self._can_forward(runner):
            self._begin(runner, runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Note the newest checkpoint, of which every process is told, as it is not of the saving itself."""
        self._newest = runner.message_hub.runtime_info.get("last_ckpt")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """After a checkpoint of an iteration-based run, begin anew as a resumed run does."""
        self._begin_anew(runner, runner.iter + 1)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Likewise, since a resumed run does no validation first, and a better model is saved after it."""
        self._begin_anew(runner, runner.iter)

    def _begin_anew(self, runner: Runner, position: int) -> None:
        loop = runner.train_loop
        saved = runner.message_hub.runtime_info.get("last_ckpt") != self._newest
        if saved and not isinstance(loop, EpochBasedTrainLoop) and self._can_forward(runner):
            self._begin(runner, position)
            loop.dataloader_iterator._iterator = None
            loop.dataloader_iterator.skip_iter(position)

    def _can_forward(self, runner: Runner) -> bool:
        iterator = getattr(runner.train_loop, "dataloader_iterator", None)
        return hasattr(iterator, "skip_iter") and hasattr(runner.train_dataloader.sampler, "skip")

    def _begin(self, runner: Runner, position: int) -> None:
        text = f"{runner.seed} {get_rank()} {position}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") // 2
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        loader = runner.train_dataloader
        if isinstance(loader.worker_init_fn, partial) and "seed" in loader.worker_init_fn.keywords:
            loader.worker_init_fn = partial(loader.worker_init_fn, seed=seed)
        loader._iterator = None  # persistent workers would keep their own state
