"""A resumed run follows the schedule and the optimizer's settings of its configuration, from where it has come to."""

import warnings
from bisect import bisect
from collections.abc import Iterable, Iterator
from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict, _ParamScheduler
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor

from .config_text import settings_of

PROGRESS = ("last_step", "_global_step", "_last_value", "verbose", "best", "num_bad_epochs", "cooldown_counter")
"""Attributes of mmengine's schedulers that change while they run, or only print; the others are settings."""


@HOOKS.register_module()
class ScheduleHook(Hook):
    """Let a resumed run go on with the rates that an uninterrupted run of its configuration would have from there on.

    mmengine goes on with the schedulers and the settings of the optimizer that are in the checkpoint, whatever the
    configuration says. Where the two differ, this hook steps the configuration's schedulers to the position of the
    checkpoint, puts their state and the configuration's settings of the optimizer into the checkpoint before it is
    loaded, and names the differences in one line of the log. Where they do not differ, the checkpoint stays as it is.

    The state of the optimizer (moving averages) stays the checkpoint's, unless the optimizer is another.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Leave functions out (of ``OneCycleLR``), which a checkpoint of plain data does not have."""
        for _, scheduler in _pairs(checkpoint.get("param_schedulers") or []):
            for name in [name for name, value in scheduler.items() if callable(value)]:
                del scheduler[name]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare, and replace what differs, before mmengine loads the states of the optimizer and the schedulers."""
        if not getattr(runner, "_resume", False) or not isinstance(runner.optim_wrapper, OptimWrapper):
            return
        schedulers = [scheduler for _, scheduler in _pairs(runner.param_schedulers or [])]
        changes = _named_changes(checkpoint, runner)
        fits = _state_fits(checkpoint, runner.optim_wrapper, changes)
        if fits and _same_settings(checkpoint, runner.optim_wrapper, schedulers):
            if changes := [change for change in changes if not change.startswith("train_cfg.")]:
                self._tell(runner, checkpoint, changes, fits)
            return
        _step_to_position(schedulers, runner, checkpoint)
        if fits:
            for name, wrapper in _wrappers(runner.optim_wrapper):
                state = checkpoint["optimizer"][name] if name else checkpoint["optimizer"]
                for theirs, ours in zip(_groups(state), wrapper.param_groups, strict=False):
                    parameters = theirs.get("params")
                    theirs.clear()
                    theirs.update({**ours, "params": parameters})
        else:
            checkpoint["optimizer"] = runner.optim_wrapper.state_dict()
        if runner.param_schedulers is not None:
            checkpoint["param_schedulers"] = _states(runner.param_schedulers)
        self._tell(runner, checkpoint, changes, fits)

    def _tell(self, runner: Runner, checkpoint: dict, changes: list[str], fits: bool) -> None:
        in_epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
        position = f"epoch {checkpoint['meta']['epoch']}" if in_epochs else f"iteration {checkpoint['meta']['iter']}"
        if changes:
            told = ", ".join(changes)
        elif fits:
            told = "the length of an epoch, or a scheduler"
        else:
            told = "the kind of the optimizer, or the parameters that it trains"
        state = "" if fits else "; the optimizer does not fit the state in the checkpoint, and starts with an empty one"
        runner.logger.warning(
            "the schedule or the optimizer differs from the checkpoint's, and the configuration's is used after "
            f"{position}: {told}{state}"
        )


def _pairs(schedulers: Any) -> Iterator[tuple[str, Any]]:
    """Schedulers, or their states, each with the name of its optimizer, which is '' for a single one."""
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
    """The groups of parameters in the state of an optimizer wrapper, and the base settings, if mmengine keeps them."""
    base = state.get("base_param_settings")
    return state["param_groups"] + ([base] if base is not None else [])


def _named_changes(checkpoint: dict, runner: Runner) -> list[str]:
    """The settings that differ between the configuration in the checkpoint and that of the run, as text."""
    names = ("train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr")
    theirs, ours = (
        {
            key: value
            for key, value in settings_of(text, *names).items()
            if not key.startswith("train_cfg.") or key in ("train_cfg.max_epochs", "train_cfg.max_iters")
        }
        for text in (str(checkpoint["meta"].get("cfg", "")), runner.cfg.pretty_text)
    )
    if not theirs or not ours:
        return []
    return [
        f"{key} {theirs.get(key, 'unset')!r} -> {ours.get(key, 'unset')!r}"
        for key in [*theirs, *(key for key in ours if key not in theirs)]
        if theirs.get(key, "unset") != ours.get(key, "unset")
    ]


def _state_fits(checkpoint: dict, wrapper: OptimWrapper, changes: list[str]) -> bool:
    """Whether the optimizers of the run can go on with the states of those in the checkpoint."""
    if any(change.partition(" ")[0].endswith("optimizer.type") for change in changes):
        return False
    wrappers, state = dict(_wrappers(wrapper)), checkpoint.get("optimizer") or {}
    states = {"": state} if "param_groups" in state else state
    return wrappers.keys() == states.keys() and all(_one_fits(states[name], wrappers[name]) for name in wrappers)


def _one_fits(state: dict, wrapper: OptimWrapper) -> bool:
    ours, theirs = wrapper.optimizer.param_groups, state["param_groups"]
    if [len(group["params"]) for group in ours] != [len(group["params"]) for group in theirs]:
        return False
    if list(map(_what_is_kept, ours)) != list(map(_what_is_kept, theirs)):
        return False
    parameters = [parameter for group in ours for parameter in group["params"]]
    return all(
        value.shape == parameters[index].shape
        for index, values in state["state"].items()
        for value in values.values()
        if isinstance(value, Tensor) and value.dim() == parameters[index].dim() > 0
    )


def _what_is_kept(group: dict) -> list[bool]:
    """The settings of torch's optimizers that decide, by being zero or not, what is kept of each parameter."""
    adam = bool(group.get("betas"))
    momentum = bool(group.get("momentum")) and not adam  # of Adam mmengine's schedulers keep one there
    return [adam, momentum, bool(group.get("amsgrad")), bool(group.get("centered"))]


def _same_settings(checkpoint: dict, wrapper: OptimWrapper, schedulers: list[_ParamScheduler]) -> bool:
    """Whether schedulers and groups of parameters are set as those in the checkpoint."""
    theirs = [state for _, state in _pairs(checkpoint.get("param_schedulers") or [])]
    if [_settings(scheduler.state_dict()) for scheduler in schedulers] != [_settings(state) for state in theirs]:
        return False
    for name, one in _wrappers(wrapper):
        state = checkpoint["optimizer"][name] if name else checkpoint["optimizer"]
        for own, group in zip(one.param_groups, _groups(state), strict=False):
            ours, known = _group_settings(own), _group_settings(group)
            if any(known[key] != value for key, value in ours.items() if key in known):
                return False
    return True


def _settings(state: dict) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in PROGRESS and not callable(value)}


def _group_settings(group: dict) -> dict[str, Any]:
    """The settings of a group of parameters; of those that are scheduled the initial values."""
    settings = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params" and f"initial_{name}" not in group
    }
    if "initial_momentum" in group and "betas" in settings:  # Adam's momentum, which mmengine schedules as such
        settings["betas"] = settings["betas"][1:]
    return settings


def _step_to_position(schedulers: list[_ParamScheduler], runner: Runner, checkpoint: dict) -> None:
    """Do what the iterations, epochs and validations before the checkpoint have done to the schedulers."""
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
        warnings.simplefilter("ignore", UserWarning)  # of schedulers that step where the optimizer does not
        for position in range(1, checkpoint["meta"]["epoch" if in_epochs else "iter"] + 1):
            for scheduler in each_iteration * length + each_epoch:
                scheduler.step()
            if _is_validated(loop, position, last):
                for scheduler, history in metrics:
                    if (found := next(history, None)) is not None:
                        scheduler.step(found)
    for scheduler, value in zip(schedulers, verbose, strict=True):
        scheduler.verbose = value


def _metrics_of(scheduler: _ParamScheduler, checkpoint: dict) -> Iterator[dict[str, float]]:
    """The results of validations that a scheduler has seen, which are in the log of the checkpoint."""
    if not getattr(scheduler, "need_val_args", False):
        return iter(())
    log = checkpoint["message_hub"]["log_scalars"].get(f"val/{scheduler.monitor}")
    values: Iterable[float] = log.data[0] if log is not None else ()
    return iter([{scheduler.monitor: float(value)} for value in values])


def _is_validated(loop: Any, position: int, last: int) -> bool:
    """Whether a loop of mmengine validates after so many epochs, or iterations."""
    interval = loop.dynamic_intervals[bisect(loop.dynamic_milestones, position + 1) - 1]
    return position >= loop.val_begin and (position % interval == 0 or position == last)
