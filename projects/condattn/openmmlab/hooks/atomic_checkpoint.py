"""Write checkpoints atomically: a file is complete, or it does not exist."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from itertools import chain
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

from ...weights.atomic import write_atomically
from ..errors import UserError

LAST = "last_checkpoint"
VALIDATED = "validated"
"""Entry of a checkpoint's ``meta``: whether it was saved after the validation of its position."""
WITHIN_EPOCH = "within_epoch"
"""Entry of a checkpoint's ``meta``: whether it was saved before the end of an epoch, in a training in epochs."""


@contextmanager
def atomic_writes() -> Iterator[None]:
    """Let mmengine write local files atomically: a file is complete, or it does not exist.

    mmengine's ``FlexibleRunner`` does not pass on the storage backend that ``CheckpointHook`` is given, so that no
    backend of our own would be used there.
    """
    put = LocalBackend.put
    LocalBackend.put = _put
    try:
        yield
    finally:
        LocalBackend.put = put


def _put(self: LocalBackend, obj: bytes, filepath: str | Path) -> None:
    write_atomically(filepath, lambda path: path.write_bytes(obj), overwrite=True)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` with atomic writes, so that no crash or full disk destroys an earlier checkpoint.

    A file gets its final name when it is complete and on the disk. After that ``last_checkpoint`` is updated, and only
    then the oldest checkpoint is removed. The arguments are those of the upstream class; where they name a backend, or
    an address as ``out_dir``, that backend writes.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._meta: dict[str, int] = {}
        self._saving = self._after_validation = False

    def before_train(self, runner: Runner) -> None:
        """Prepare as upstream does, restore the path of the last checkpoint, and delete partial files of a killed run.

        Upstream does not set this path in a resumed run, and without it does not save again after a better validation.
        The best checkpoint so far is deleted for a better one only if it is in this folder: that of a training in
        another folder, which this one goes on with, is kept.
        """
        super().before_train(runner)
        self.last_ckpt = runner.message_hub.runtime_info.get("last_ckpt")
        if getattr(self, "best_ckpt_path", None):
            self.best_ckpt_path = self._own(self.best_ckpt_path)
        best = getattr(self, "best_ckpt_path_dict", {})
        best.update({name: self._own(path) for name, path in best.items() if path})
        if is_main_process() and Path(self.out_dir).is_dir():
            names = (self.filename_tmpl.partition("{")[0], "best_", LAST)
            for part in chain(*(Path(self.out_dir).glob(f".{escape(name)}*.part") for name in names)):
                part.unlink(missing_ok=True)

    def _own(self, path: str) -> str | None:
        """The file of the name of ``path`` in the folder of this training; None if there is none."""
        own = self.file_backend.join_path(self.out_dir, Path(path).name)
        return own if self.file_backend.isfile(own) or self.file_backend.isdir(own) else None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Set epoch and iteration in the checkpoint: ``FlexibleRunner``'s are one too large after a validation."""
        if not self._saving:  # another hook is
            return
        meta, loop = checkpoint["meta"], runner.train_loop
        meta.update(self._meta)
        meta[VALIDATED] = self._after_validation
        in_epochs = isinstance(loop, EpochBasedTrainLoop)
        meta[WITHIN_EPOCH] = in_epochs and not self._after_validation and meta["iter"] % len(loop.dataloader) > 0

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        surplus = None
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                surplus = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        previous, self.last_ckpt = self.last_ckpt, self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        outer = self._meta, self._saving
        self._meta, self._saving = self._meta or dict(meta), True
        try:
            with atomic_writes():
                runner.save_checkpoint(
                    self.out_dir,
                    name,
                    self.file_client_args,
                    save_optimizer=self.save_optimizer,
                    save_param_scheduler=self.save_param_scheduler,
                    meta=meta,
                    by_epoch=self.by_epoch,
                    backend_args=self.backend_args,
                    **self.args,
                )
            if is_main_process():
                last = Path(runner.work_dir, LAST)
                write_atomically(last, lambda path: path.write_text(self.last_ckpt), overwrite=True)
        except OSError as error:
            newest = f"the newest complete one is {previous}" if previous else "there is no earlier one"
            raise UserError(f"the checkpoint {self.last_ckpt} could not be written ({error}); {newest}") from error
        finally:
            self._meta, self._saving = outer
        if surplus is not None and is_main_process():
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(surplus))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # sharded
                self.file_backend.rmtree(path)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Save the best checkpoint; delete the previous best one only when the new one has been written."""
        if absent := [name for name in getattr(self, "key_indicators", ()) if name not in (*metrics, "auto")]:
            runner.logger.warning(
                f"no best checkpoint is chosen: save_best names {', '.join(absent)}, and the validation reports "
                f"{', '.join(metrics)}"
            )
            return
        surplus: list[tuple[Callable, str]] = []
        backend = self.file_backend
        deletions = {name: getattr(backend, name) for name in ("remove", "rmtree") if hasattr(backend, name)}
        self._meta = {"epoch": runner.epoch, "iter": runner.iter}
        self._saving = self._after_validation = True
        for name, delete in deletions.items():
            setattr(backend, name, lambda path, delete=delete: surplus.append((delete, path)))
        try:
            with atomic_writes():
                super()._save_best_checkpoint(runner, metrics)
        except OSError as error:
            kept = ", ".join(str(path) for _, path in surplus) or "none"
            raise UserError(
                f"the best checkpoint could not be written ({error}); the one before it is {kept}"
            ) from error
        finally:
            for name in deletions:
                delattr(backend, name)
            self._meta = {}
            self._saving = self._after_validation = False
        current = {getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()}
        for delete, path in surplus:
            if path not in current:  # the new one may have the name of the previous one, which it has replaced
                delete(path)
