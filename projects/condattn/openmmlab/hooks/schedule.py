"""Make a resumed run follow the schedule and the optimizer settings of its configuration."""

import warnings
from bisect import bisect
from collections.abc import Iterable, Iterator
from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict, _ParamScheduler
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor

from ..config_text import settings_of

PROGRESS = ("last_step", "_global_step", "_last_value", "verbose", "best", "num_bad_epochs", "cooldown_counter")
"""Attributes of mmengine's schedulers that change during a run or control printing; all others are settings."""


@HOOKS.register_module()
class ScheduleHook(Hook):
    """Give a resumed run the rates that an uninterrupted run of its configuration would have from its position on.

    mmengine continues with the schedulers and optimizer settings in the checkpoint, whatever the configuration says. If
    the two differ, this hook steps the configuration's schedulers to the position of the checkpoint, writes their state
    and the configuration's optimizer settings into the checkpoint before it is loaded, and logs the differences in one
    line. If they do not differ, the checkpoint is loaded as it is.

    The state of the optimizer (moving averages) is that of the checkpoint, unless the optimizer has changed.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remove functions from scheduler states (``OneCycleLR`` has one), so that a checkpoint is plain data."""
        for _, scheduler in _pairs(checkpoint.get("param_schedulers") or []):
            for name in [name for name, value in scheduler.items() if callable(value)]:
                del scheduler[name]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Replace what differs before mmengine loads the states of the optimizer and the schedulers."""
        if not getattr(runner, "_resume", False) or not isinstance(runner.optim_wrapper, OptimWrapper):
            return
        schedulers = [scheduler for _, scheduler in _pairs(runner.param_schedulers or [])]
        changes = _named_changes(checkpoint, runner)
        fits = _state_fits(checkpoint, runner.optim_wrapper, changes)
        if fits and _same_settings(checkpoint, runner.optim_wrapper, schedulers):
            if changes := [change for change in changes if not change.startswith("train_cfg.")]:
                self._log_changes(runner, checkpoint, changes, fits)
            return
        _step_to_position(schedulers, runner, checkpoint)
        if fits:
            for name, wrapper in _wrappers(runner.optim_wrapper):
                state = checkpoint["optimizer"][name] if name else checkpoint["optimizer"]
                for saved, current in zip(_groups(state), wrapper.param_groups, strict=False):
                    parameters = saved.get("params")
                    saved.clear()
                    saved.update({**current, "params": parameters})
        else:
            checkpoint["optimizer"] = runner.optim_wrapper.state_dict()
        if runner.param_schedulers is not None:
            checkpoint["param_schedulers"] = _states(runner.param_schedulers)
        self._log_changes(runner, checkpoint, changes, fits)

    def _log_changes(self, runner: Runner, checkpoint: dict, changes: list[str], fits: bool) -> None:
        in_epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
        position = f"epoch {checkpoint['meta']['epoch']}" if in_epochs else f"iteration {checkpoint['meta']['iter']}"
        if changes:
            description = ", ".join(changes)
        elif fits:
            description = "the length of an epoch, or a scheduler"
        else:
            description = "the kind of the optimizer, or the parameters that it trains"
        state = "" if fits else "; the optimizer does not fit the state in the checkpoint, and starts with an empty one"
        runner.logger.warning(
            "the schedule or the optimizer differs from the checkpoint's, and the configuration's is used after "
            f"{position}: {description}{state}"
        )


def _pairs(schedulers: Any) -> Iterator[tuple[str, Any]]:
    """Yield each scheduler, or scheduler state, with the name of its optimizer, '' for a single optimizer."""
    named = schedulers if isinstance(schedulers, dict) else {"": schedulers}
    for name, some in named.items():
        yield from ((name, scheduler) for scheduler in some)


def _states(schedulers: list | dict) -> list | dict:
    if isinstance(schedulers, dict):
        return {name: _states(some) for name, some in schedulers.items()}
    return [scheduler.state_dict() for scheduler in schedulers]


def _wrappers(wrapper: OptimWrapper) -> list[tuple[str, OptimWrapper]]:
    return list(wrapper.items()) if isinstance(wrapper, OptimWrapperDict) else [("", wrapper)]


def _groups(state: dict) -> list[dict]:
    """The parameter groups in the state of an optimizer wrapper, and mmengine's base settings, if it has them."""
    base = state.get("base_param_settings")
    return state["param_groups"] + ([base] if base is not None else [])


def _named_changes(checkpoint: dict, runner: Runner) -> list[str]:
    """The settings that differ between the configuration in the checkpoint and that of the run, as text."""
    names = ("train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr")
    saved, current = (
        {
            key: value
            for key, value in settings_of(text, *names).items()
            if not key.startswith("train_cfg.") or key in ("train_cfg.max_epochs", "train_cfg.max_iters")
        }
        for text in (str(checkpoint["meta"].get("cfg", "")), runner.cfg.pretty_text)
    )
    if not saved or not current:
        return []
    return [
        f"{key} {saved.get(key, 'unset')!r} -> {current.get(key, 'unset')!r}"
        for key in [*saved, *(key for key in current if key not in saved)]
        if saved.get(key, "unset") != current.get(key, "unset")
    ]


def _state_fits(checkpoint: dict, wrapper: OptimWrapper, changes: list[str]) -> bool:
    """Whether the optimizer states in the checkpoint fit the optimizers of the run."""
    if any(change.partition(" ")[0].endswith("optimizer.type") for change in changes):
        return False
    wrappers, state = dict(_wrappers(wrapper)), checkpoint.get("optimizer") or {}
    states = {"": state} if "param_groups" in state else state
    return wrappers.keys() == states.keys() and all(_fits_optimizer(states[name], wrappers[name]) for name in wrappers)


def _fits_optimizer(state: dict, wrapper: OptimWrapper) -> bool:
    current, saved = wrapper.optimizer.param_groups, state["param_groups"]
    if [len(group["params"]) for group in current] != [len(group["params"]) for group in saved]:
        return False
    if list(map(_state_flags, current)) != list(map(_state_flags, saved)):
        return False
    parameters = [parameter for group in current for parameter in group["params"]]
    return all(
        value.shape == parameters[index].shape
        for index, values in state["state"].items()
        for value in values.values()
        if isinstance(value, Tensor) and value.dim() == parameters[index].dim() > 0
    )


def _state_flags(group: dict) -> list[bool]:
    """Flags that determine which state torch's optimizers keep for each parameter of ``group``."""
    adam = bool(group.get("betas"))
    momentum = bool(group.get("momentum")) and not adam  # mmengine's schedulers add a momentum to Adam's groups
    return [adam, momentum, bool(group.get("amsgrad")), bool(group.get("centered"))]


def _same_settings(checkpoint: dict, wrapper: OptimWrapper, schedulers: list[_ParamScheduler]) -> bool:
    """Whether schedulers and parameter groups have the same settings as those in the checkpoint."""
    saved = [state for _, state in _pairs(checkpoint.get("param_schedulers") or [])]
    if [_settings(scheduler.state_dict()) for scheduler in schedulers] != [_settings(state) for state in saved]:
        return False
    for name, one in _wrappers(wrapper):
        state = checkpoint["optimizer"][name] if name else checkpoint["optimizer"]
        for own, group in zip(one.param_groups, _groups(state), strict=False):
            current, saved_settings = _group_settings(own), _group_settings(group)
            if any(saved_settings[key] != value for key, value in current.items() if key in saved_settings):
                return False
    return True


def _settings(state: dict) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in PROGRESS and not callable(value)}


def _group_settings(group: dict) -> dict[str, Any]:
    """The settings of a parameter group, with the initial values of those that are scheduled."""
    settings = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params" and f"initial_{name}" not in group
    }
    if "initial_momentum" in group and "betas" in settings:  # the first is Adam's momentum, which mmengine schedules
        settings["betas"] = settings["betas"][1:]
    return settings


def _step_to_position(schedulers: list[_ParamScheduler], runner: Runner, checkpoint: dict) -> None:
    """Step the schedulers as the iterations, epochs and validations before the checkpoint have done."""
    loop = runner.train_loop
    in_epochs = isinstance(loop, EpochBasedTrainLoop)
    length, last = (len(loop.dataloader), loop.max_epochs) if in_epochs else (1, loop.max_iters)
    each_iteration = [scheduler for scheduler in schedulers if not scheduler.by_epoch]
    each_epoch = [scheduler for scheduler in schedulers if scheduler.by_epoch and in_epochs]
    metrics = [(scheduler, _metrics_of(scheduler, checkpoint)) for scheduler in schedulers]
    verbose = [scheduler.verbose for scheduler in schedulers]
    for scheduler in schedulers:
        scheduler.verbose = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about schedulers that step without the optimizer
        for position in range(1, checkpoint["meta"]["epoch" if in_epochs else "iter"] + 1):
            for scheduler in each_iteration * length + each_epoch:
                scheduler.step()
            if is_validated(loop, position, last):
                for scheduler, history in metrics:
                    if (found := next(history, None)) is not None:
                        scheduler.step(found)
    for scheduler, value in zip(schedulers, verbose, strict=True):
        scheduler.verbose = value


def _metrics_of(scheduler: _ParamScheduler, checkpoint: dict) -> Iterator[dict[str, float]]:
    """Iterate over the validation results that a scheduler has received, from the log in the checkpoint."""
    if not getattr(scheduler, "need_val_args", False):
        return iter(())
    log = checkpoint["message_hub"]["log_scalars"].get(f"val/{scheduler.monitor}")
    values: Iterable[float] = log.data[0] if log is not None else ()
    return iter([{scheduler.monitor: float(value)} for value in values])


def is_validated(loop: Any, position: int, last: int) -> bool:
    """Whether a training loop of mmengine validates after ``position`` of ``last`` epochs or iterations."""
    interval = loop.dynamic_intervals[bisect(loop.dynamic_milestones, position + 1) - 1]
    return position >= loop.val_begin and (position % interval == 0 or position == last)
