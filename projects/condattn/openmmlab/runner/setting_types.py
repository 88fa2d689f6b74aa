"""Find settings of the runner that have another type than mmengine expects, before anything reads them."""

from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook

from ..data_check.settings import is_dict_or_none, mistyped
from ..errors import UserError

LOOPS = ("train", "val", "test")


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_number_or_none(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _is_whole(value: Any) -> bool:
    return type(value) is int or (type(value) is float and value.is_integer())


def _is_positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_settings(value: Any) -> bool:
    """Whether a value is None, settings, or a list of settings."""
    entries = value if isinstance(value, list | tuple) else [value]
    return value is None or all(isinstance(entry, dict) for entry in entries)


def _are_hooks(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and all(isinstance(hook, dict | Hook) for hook in value))


def _are_named_hooks(value: Any) -> bool:
    hooks = value.values() if isinstance(value, dict) else [value]
    return all(hook is None or isinstance(hook, dict | Hook) for hook in hooks)


def _is_batch_size(value: Any) -> bool:
    return value is None or _is_positive(value)


def _is_number_of_workers(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_seed(value: Any) -> bool:
    return value is None or (type(value) is int and 0 <= value < 2**32)


EXPECTED = (
    ("model", _is_dict, "dict(type=...)"),
    ("data_preprocessor", is_dict_or_none, "dict(type=...)"),
    *((f"{loop}_dataloader", is_dict_or_none, "dict(batch_size=..., dataset=dict(...))") for loop in LOOPS),
    *((f"{loop}_dataloader.batch_size", _is_batch_size, "a whole number above 0") for loop in LOOPS),
    *((f"{loop}_dataloader.num_workers", _is_number_of_workers, "a whole number, 0 or more") for loop in LOOPS),
    *((f"{loop}_cfg", is_dict_or_none, "the settings of a loop, dict(type=...)") for loop in LOOPS),
    *((f"{loop}_evaluator", _are_settings, "dict(type=...) or a list of these") for loop in LOOPS[1:]),
    ("train_cfg.max_epochs", _is_whole, "a whole number"),
    ("train_cfg.max_iters", _is_whole, "a whole number"),
    ("train_cfg.val_begin", _is_whole, "a whole number"),
    ("train_cfg.val_interval", _is_whole, "a whole number"),
    ("optim_wrapper", is_dict_or_none, "dict(optimizer=dict(type=..., lr=...))"),
    ("optim_wrapper.optimizer", is_dict_or_none, "dict(type=..., lr=...)"),
    ("optim_wrapper.optimizer.lr", _is_number_or_none, "a number"),
    ("optim_wrapper.optimizer.weight_decay", _is_number_or_none, "a number"),
    ("optim_wrapper.clip_grad", is_dict_or_none, "dict(max_norm=...)"),
    ("optim_wrapper.accumulative_counts", _is_positive, "a whole number above 0"),
    ("param_scheduler", _are_settings, "a list of dict(type=...)"),
    ("auto_scale_lr", is_dict_or_none, "dict(base_batch_size=...)"),
    ("default_hooks", _are_named_hooks, "dict(name=dict(type=...), ...)"),
    ("default_hooks.checkpoint.interval", _is_whole, "a whole number"),
    ("default_hooks.logger.interval", _is_positive, "a whole number above 0"),
    ("custom_hooks", _are_hooks, "a list of dict(type=...)"),
    ("visualizer", is_dict_or_none, "dict(type=...)"),
    ("env_cfg", _is_dict, "dict(cudnn_benchmark=..., ...)"),
    ("log_processor", is_dict_or_none, "dict(window_size=..., ...)"),
    ("randomness", _is_dict, "dict(seed=...)"),
    ("randomness.seed", _is_seed, "a whole number from 0 to 4294967295"),
    ("runner_type", lambda value: isinstance(value, str), "the name of a runner"),
    ("strategy", is_dict_or_none, "dict(type=...)"),
    ("model_wrapper_cfg", is_dict_or_none, "dict(type=...)"),
    ("load_from", _is_text_or_none, "the path or URL of a checkpoint"),
    ("work_dir", _is_text_or_none, "the path of a folder"),
)
"""Settings of the runner: the key, whether a value is valid, and what is expected."""


def check_types(cfg: Config) -> None:
    """Check the types of the settings of ``cfg``.

    Raises:
        UserError: If a setting is of another type than mmengine's runner expects; the message names the setting.
    """
    for problem in mistyped(dict(cfg.items()), ((*row, "; write it so") for row in EXPECTED)):
        raise UserError(f"{cfg.filename}: {problem}")
