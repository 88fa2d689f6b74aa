"""Runs that survive: whole checkpoints, a resume that changes no bit, and a stop where the loss is not a number."""

import hashlib
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine import dist
from mmengine.dist import get_rank, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from ..checkpoints.files import write_whole
from ..sites import find_sites
from .errors import UserError

LAST = "last_checkpoint"


class WholeFileBackend(LocalBackend):
    """mmengine's local files, of which each is whole or not there."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes."""
        write_whole(filepath, lambda path: path.write_bytes(obj), overwrite=True)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write text."""
        self.put(obj.encode(encoding), filepath)


register_backend("whole_file", WholeFileBackend, force=True)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, such that neither a crash nor a full disk costs a checkpoint.

    A file gets its name when it is whole and on the disk; ``last_checkpoint`` names it after that; only then the oldest
    is removed. Arguments as upstream.
    """

    def __init__(self, *args, backend_args: dict | None = None, **kwargs) -> None:
        super().__init__(*args, backend_args=backend_args or {"backend": "whole_file"}, **kwargs)
        self._meta: dict[str, int] = {}

    def before_train(self, runner: Runner) -> None:
        """As upstream, and remove what a killed run has left half-written."""
        super().before_train(runner)
        if is_main_process() and Path(self.out_dir).is_dir():
            for part in Path(self.out_dir).glob(".*.part"):
                part.unlink()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put the position of the run in, which ``FlexibleRunner`` counts one too far after a validation."""
        checkpoint["meta"].update(self._meta)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        surplus = None
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                surplus = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        before, self.last_ckpt = self.last_ckpt, self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        outer, self._meta = self._meta, self._meta or dict(meta)
        try:
            runner.save_checkpoint(
                self.out_dir,
                name,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                last = Path(runner.work_dir, LAST)
                write_whole(last, lambda path: path.write_text(self.last_ckpt), overwrite=True)
        except OSError as error:
            newest = f"the newest whole one is {before}" if before else "there is no earlier one"
            raise UserError(f"the checkpoint {self.last_ckpt} could not be written ({error}); {newest}") from error
        finally:
            self._meta = outer
        if surplus is not None and is_main_process():
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(surplus))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # sharded
                self.file_backend.rmtree(path)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Keep the best one so far until the new one is there."""
        surplus: list[tuple[Callable, str]] = []
        backend = self.file_backend
        remove, rmtree = backend.remove, backend.rmtree
        self._meta = {"epoch": runner.epoch, "iter": runner.iter}
        backend.remove = lambda path: surplus.append((remove, path))
        backend.rmtree = lambda path: surplus.append((rmtree, path))
        try:
            super()._save_best_checkpoint(runner, metrics)
        except OSError as error:
            kept = ", ".join(str(path) for _, path in surplus) or "none"
            raise UserError(
                f"the best checkpoint could not be written ({error}); the one before it is {kept}"
            ) from error
        finally:
            del backend.remove, backend.rmtree
            self._meta = {}
        for delete, path in surplus:
            delete(path)


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


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop a run whose loss is not finite, before the weights take harm, and say where that comes from."""

    def before_train(self, runner: Runner) -> None:
        """Watch the losses that the model returns."""
        self._runner = runner
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._hook = model.register_forward_hook(self._check, with_kwargs=True)

    def after_train(self, runner: Runner) -> None:
        """Watch no longer."""
        self._hook.remove()

    def _check(self, model: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if not (model.training and isinstance(output, dict)):
            return
        losses = {name: value for name, value in output.items() if "loss" in name}
        bad = [name for name, value in losses.items() if not all(part.isfinite().all() for part in _tensors(value))]
        somewhere = torch.tensor(float(bool(bad)))
        dist.all_reduce(somewhere, op="max")  # all processes stop together, and run the model once more together
        if not somewhere:
            return
        self._hook.remove()
        newest = Path(self._runner.work_dir, LAST)
        checkpoint = newest.read_text().strip() if newest.exists() else "none"
        troubles = _union(dist.all_gather_object(find_trouble(model, args, kwargs)))
        raise UserError(
            f"{', '.join(_union(dist.all_gather_object(bad)))} is not finite in iteration {self._runner.iter + 1}; "
            f"{'; '.join(troubles) or 'the attention sites are sound'}; the last checkpoint is {checkpoint}; "
            "lower the learning rate, clip the gradients, or look at the data of this iteration"
        )


@torch.no_grad()
def find_trouble(model: nn.Module, args: tuple, kwargs: dict) -> list[str]:
    """Run ``model`` once more, and name the attention sites with values that explain a loss that is not finite.

    Returns:
        One text for each kind of trouble: weights that are not finite; head outputs that are not; rows of head outputs
        that are zero; queries and keys so long that the softmax is saturated (a bound of its logits beyond 1000).
    """
    found: dict[str, list[str]] = {}
    hooks = []

    def note(kind: str, site: str) -> None:
        if site not in found.setdefault(kind, []):
            found[kind].append(site)

    for site in find_sites(model):
        lengths: dict[str, float] = {}
        for name in ("q", "k"):
            projection = getattr(site, name)
            if projection is None:
                continue
            if not projection.weight.isfinite().all():
                note("weights that are not finite", site.name)
            if isinstance(projection.owner, nn.Linear):

                def measure(module, args, output, name=name, rows=projection.rows, lengths=lengths, site=site):
                    part = torch.cat([output[..., r] for r in rows], -1).unflatten(-1, (site.num_heads, -1))
                    lengths[name] = part.norm(dim=-1).max().item()
                    if lengths.keys() == {"q", "k"} and lengths["q"] * lengths["k"] / part.shape[-1] ** 0.5 > 1000:
                        note("saturated logits", site.name)

                hooks.append(projection.owner.register_forward_hook(measure))
        if site.out is not None and not isinstance(site.out.owner, nn.MultiheadAttention):

            def look(module, args, site=site):
                if not args[0].isfinite().all():
                    note("head outputs that are not finite", site.name)
                elif (args[0].abs().amax(site.out.axis) == 0).any():
                    note("zero rows", site.name)

            hooks.append(site.out.owner.register_forward_pre_hook(look))
    try:
        model.forward(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return [f"{kind} at {', '.join(sites[:3])}{', ...' * (len(sites) > 3)}" for kind, sites in found.items()]


def _union(lists: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(item for one in lists for item in one))


def _tensors(value: Tensor | list | tuple) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
