"""Show a progress bar with the remaining time for training, validation and test loops."""

import sys
from contextlib import ExitStack, contextmanager
from logging import Logger, StreamHandler

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tqdm import tqdm


class _StreamAboveBars:
    """A console stream that prints its lines above the progress bars instead of through them."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        tqdm.write(text, file=self.stream, end="")

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def _log_above_bars(logger: Logger):
    """Let the console handlers of ``logger`` print above the bars; their level, format and filters stay."""
    console = [
        handler
        for handler in logger.handlers
        if isinstance(handler, StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
    ]
    streams = [handler.setStream(_StreamAboveBars(handler.stream)) for handler in console]
    try:
        yield
    finally:
        for handler, stream in zip(console, streams, strict=True):
            handler.setStream(stream)


@HOOKS.register_module()
class ProgressHook(Hook):
    """Show the progress of the run and the remaining time on a terminal.

    One bar counts the iterations of the whole training, epoch-based or iteration-based; in a resumed run it starts at
    the position of the checkpoint. A second bar appears below it during a validation. A test has a bar of its own. Only
    the main process draws, and only if standard error is a terminal: in a log file mmengine's own lines, which contain
    an ``eta``, are the better record.
    """

    priority = "LOW"

    def __init__(self):
        self._bars: dict[str, tuple[tqdm, ExitStack]] = {}

    def before_train(self, runner) -> None:
        """Open the bar of the whole training."""
        self._open(runner, "train", total=runner.max_iters, initial=runner.iter)

    def after_train(self, runner) -> None:
        """Close the bar of the training."""
        self._close("train")

    def before_val_epoch(self, runner) -> None:
        """Open the bar of one validation."""
        self._open(runner, "val", total=len(runner.val_dataloader))

    def before_test_epoch(self, runner) -> None:
        """Open the bar of the test."""
        self._open(runner, "test", total=len(runner.test_dataloader))

    def _after_iter(self, runner, batch_idx, data_batch=None, outputs=None, mode="train") -> None:
        if mode not in self._bars:
            return
        bar, _ = self._bars[mode]
        bar.update()
        # Evaluators print their tables before the epoch ends: a full bar must be closed by then.
        if mode != "train" and bar.n >= bar.total:
            self._close(mode)

    def _open(self, runner, mode: str, total: int, initial: int = 0) -> None:
        if not (is_main_process() and sys.stderr.isatty()):
            return
        stack = ExitStack()
        stack.enter_context(_log_above_bars(runner.logger))
        bar = tqdm(total=total, initial=initial, desc=mode, dynamic_ncols=True, leave=mode != "val")
        self._bars[mode] = stack.enter_context(bar), stack

    def _close(self, mode: str) -> None:
        if mode in self._bars:
            _, stack = self._bars.pop(mode)
            stack.close()
