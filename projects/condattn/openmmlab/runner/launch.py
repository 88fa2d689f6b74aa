"""Build models and runners from command lines; refuse bad input first.

Everything that can be checked is checked before anything is written: a work directory is created only when the
configuration, the data, the model and the checkpoint have passed their checks.
"""

import copy
import os
import re
import sys
import warnings
from argparse import ArgumentParser, Namespace
from contextlib import redirect_stdout
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from ...stack import check_stack, describe_operators
from ..config_files import is_config
from ..data_check.settings import class_of
from ..errors import UserError
from ..hooks.conditioning_guard import ConditioningGuardHook
from ..hooks.drawn_classes import DrawnClassesHook
from ..hooks.empty_evaluation import EmptyEvaluationHook
from ..hooks.exact_resume import ExactResumeHook
from ..hooks.finite_loss import FiniteLossHook
from ..hooks.progress import ProgressHook
from ..hooks.schedule import ScheduleHook
from ..models.settings import CONDITIONED, class_name, module_settings, parts
from ..processes import LAUNCHERS, start_processes
from .checkpoints import read_safely
from .setting_types import check_types
from .sharding import check_sharding

TOOLBOXES = ("mmdet", "mmseg", "mmpretrain", "mmengine")
DRAWN = ("mmdet", "mmseg")
"""Toolboxes whose predictions are drawn and written; those of the others are scored alone."""
BAD_SETTINGS = ("is not in the", 'must contain the key "type"', "unexpected keyword argument", "missing 1 required")
"""In messages of Python's and mmengine's errors: a setting that is unknown or missing."""
UNSET = re.compile(r"`(\w+)` cannot be found in `os\.environ`")
"""In mmengine's message: an environment variable that a configuration refers to and that has no value."""

# The warning says that metrics will not be computed, which holds for mmdet's optional FasterCocoMetric alone.
warnings.filterwarnings("ignore", message="faster_coco_eval is not installed")


class ConfigOptions(DictAction):
    """mmengine's ``DictAction``, which also keeps blanks in values, and reads a conditioning with settings as a text.

    ``key=my data`` is a text with a blank, and ``sc(strength=3.0,relative=True)`` is a text too, also in a list.
    """

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: list[str], option_string=None) -> None:
        """Add the options to ``namespace``.

        Raises:
            UserError: If one of them is not KEY=VALUE, or its brackets are unbalanced.
        """
        for value in values:
            try:
                super().__call__(parser, namespace, [value], option_string)
            except ValueError as error:
                raise UserError(
                    f"--cfg-options: expected KEY=VALUE without spaces, found {value}; put other arguments before "
                    'this option, and lists in quotation marks, as in key="[a,b]"'
                ) from error

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        """Return the list, tuple, number, truth value or text that ``val`` stands for."""
        text = val.strip().strip("'\"").strip()
        kind = {"[]": list, "()": tuple}.get(text[:1] + text[-1:]) if len(_elements(text)) == 1 else None
        elements = _elements(text[1:-1] if kind else text)
        if kind is None and len(elements) == 1:
            return DictAction._parse_int_float_bool(text)
        values = [ConfigOptions._parse_iterable(element) for element in elements if element.strip()]
        return tuple(values) if kind is tuple else values


def _elements(text: str) -> list[str]:
    """Split ``text`` at the commas outside all brackets.

    Raises:
        ValueError: If it has commas, and brackets that are not balanced.
    """
    found, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    if depth and "," in text:
        raise ValueError(f"unbalanced brackets in {text}")
    return found


def add_config_arguments(parser: ArgumentParser, otherwise: str = "") -> None:
    """Add the arguments of all tools: the configuration (its help ends with ``otherwise``) and changes to it."""
    parser.add_argument(
        "config",
        help="configuration file; its default_scope (mmdet, mmseg, mmpretrain or mmengine) decides the toolbox"
        + otherwise,
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=ConfigOptions,
        metavar="KEY=VALUE",
        help="change settings of the configuration, e.g. model.backbone.conditioning=none "
        'train_dataloader.batch_size=4; lists as key="[a,b]" or key=a,b, without spaces',
    )


def add_runner_arguments(parser: ArgumentParser) -> None:
    """Add the further arguments of the tools with a runner (train and test)."""
    parser.add_argument(
        "--work-dir",
        help="folder for logs and checkpoints (default: work_dir of the configuration, else work_dirs/ "
        "and the configuration's path below configs/, without suffix)",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", *LAUNCHERS],
        default="none",
        help="what started the processes of a distributed run, as the dist_*.sh and slurm_*.sh set it "
        "(default: %(default)s)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by some launchers, not by you")


class _WithoutMissingPackages:
    """A stream to standard error that leaves out which optional packages a toolbox cannot import."""

    def write(self, text: str) -> int:
        """Write a text, or the end of a line that was not left out."""
        self.left_out = text.startswith("Could not import") or (text == "\n" and getattr(self, "left_out", False))
        return len(text) if self.left_out else sys.stderr.write(text)

    def flush(self) -> None:
        """Flush standard error."""
        sys.stderr.flush()


def load_config(path: str, options: dict | None = None) -> Config:
    """Load a configuration, apply ``options`` and enter its default scope.

    Raises:
        UserError: If the file is missing or no valid configuration, the default scope is none of
            ``TOOLBOXES``, that toolbox is not installed, or the environment mixes package stacks.
    """
    try:
        check_stack()
    except RuntimeError as error:
        raise UserError(error) from error
    if not Path(path).is_file():
        raise UserError(f"no configuration file {path}; the ones of this project are in configs/")
    if not is_config(path):
        raise UserError(f"expected a configuration file (.py, .json, .yaml, .yml), got {path}")
    try:
        with redirect_stdout(_WithoutMissingPackages()):
            cfg = Config.fromfile(path)
    except Exception as error:  # the code of the file, and of those that it inherits, may raise anything
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, FileNotFoundError | ImportError | SyntaxError) else f"{type(error).__name__}: "
        if unset := UNSET.search(reason):
            state = (
                "is empty; unset it, or give it a value" if unset[1] in os.environ else "is not set; give it a value"
            )
            kind, reason = "", f"the environment variable {unset[1]} {state}"
        raise UserError(f"cannot read the configuration {path}: {kind}{reason}") from error
    try:
        cfg.merge_from_dict(options or {})
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise UserError(
            f"--cfg-options does not fit {path}: {reason}; a value that is no dictionary is replaced as a whole, as in "
            '"model.backbone.conditioning=sc(strength=3.0)"'
        ) from error
    scope = cfg.get("default_scope")
    if scope not in TOOLBOXES:
        raise UserError(f"{path}: expected default_scope to be one of {', '.join(TOOLBOXES)}, found {scope!r}")
    try:
        with redirect_stdout(_WithoutMissingPackages()):
            import_module(scope)
    except (ImportError, AssertionError) as error:
        advice = f"mmcv's operators here: {describe_operators()}" if "mmcv._ext" in str(error) else "see the README"
        raise UserError(f"{path} needs {scope}, which cannot be imported ({error}); {advice}") from error
    init_default_scope(scope)
    return cfg


def load_runner_config(args: Namespace) -> Config:
    """Load the configuration of a tool with a runner by :func:`load_config`; set launcher and work directory.

    Raises:
        UserError: As :func:`load_config`, and for settings of a wrong type or that exclude each other.
    """
    cfg = load_config(args.config, args.cfg_options)
    check_types(cfg)
    read_safely(args.unsafe)
    # Objects that are built for the checks are built again by the runner, whose own logger reports them.
    MMLogger.get_current_instance().setLevel("WARNING")
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or default_work_dir(args.config)
    check_sharding(cfg)
    return cfg


def default_work_dir(config: str) -> str:
    """Join ``work_dirs/`` and the path of ``config`` below its folder ``configs`` (else its name), without suffix."""
    parts = Path(config).resolve().with_suffix("").parts
    below = parts[len(parts) - parts[::-1].index("configs") :] if "configs" in parts[:-1] else parts[-1:]
    return str(Path("work_dirs", *below))


def build_model(cfg: Config) -> nn.Module:
    """Build the model of ``cfg`` on the CPU, without initialising its weights.

    Raises:
        UserError: If the configuration of the model is invalid: an unknown type, argument, conditioning, or
            a pattern that matches nothing.
    """
    settings = copy.deepcopy(cfg.model)
    if cfg.get("data_preprocessor"):
        settings.setdefault("data_preprocessor", cfg.data_preprocessor)
    try:
        return MODELS.build(settings)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        message = str(error.args[0]) if error.args else _failed_line(error)
        if isinstance(error, KeyError | TypeError) and not any(text in message for text in BAD_SETTINGS):
            raise
        raise UserError(f"the model of {cfg.filename} cannot be built: {message}{_hint(settings, message)}") from error
    except (
        IndexError,
        AttributeError,
        RuntimeError,
        ZeroDivisionError,
    ) as error:  # settings that contradict each other
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}, at {_failed_line(error)}"
        raise UserError(f"the model of {cfg.filename} cannot be built: {message}") from error


def _failed_line(error: Exception) -> str:
    """The line of code that raised an error."""
    last = extract_tb(error.__traceback__)[-1]
    return f"{last.line} ({last.filename}, line {last.lineno})"


def _hint(settings: Any, message: str) -> str:
    """Name the setting that ``message`` complains about, with its path, and the most similar one that its class has."""
    found = re.search(r"unexpected keyword argument '(\w+)'", message)
    for path, part in parts(settings, "model") if found else ():
        conditioned = class_name(part) == "Conditioned"
        cls = class_of(module_settings(part) if conditioned else part, MODELS)
        if found[1] not in part or not isinstance(cls, type):
            continue
        known = {name for base in cls.__mro__ for name in signature(base.__init__).parameters}
        known.update(CONDITIONED if conditioned else ())
        similar = get_close_matches(found[1], known - {found[1]}, n=1)
        return f"; it is {path}.{found[1]}" + (f"; did you mean {path}.{similar[0]}?" if similar else "")
    return ""


def build_runner(cfg: Config, other_conditioning: bool = False, given: Config | None = None) -> Runner:
    """Join the processes of a distributed run, and build the runner with a progress bar and the hooks that guard a run.

    Args:
        cfg: The configuration.
        other_conditioning: Whether checkpoints of a model that is conditioned otherwise are loaded.
        given: The configuration to save in the work directory, if ``cfg`` was adapted to the data.
    """
    given = given or copy.deepcopy(cfg)
    start_processes(cfg)
    cfg.default_hooks = {"checkpoint": {"type": "CheckpointHook"}, **(cfg.get("default_hooks") or {})}
    for settings in (cfg.default_hooks.checkpoint, *(cfg.get("custom_hooks") or ())):
        if isinstance(settings, dict) and class_name(settings) == "CheckpointHook":
            settings["type"] = "AtomicCheckpointHook"
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    if isinstance(runner.model, dict):  # FlexibleRunner builds its model only when the run begins
        runner.model = runner.strategy.build_model(runner.model)
    # The runner saves this configuration in the work directory.
    runner.cfg = given
    runner.dump_config()
    runner.logger.info(f"mmcv's operators: {describe_operators()}")
    guard = ConditioningGuardHook(other_conditioning)
    own_hooks = (
        *(ProgressHook(), guard, ScheduleHook(), FiniteLossHook(), EmptyEvaluationHook()),
        *(DrawnClassesHook(), ExactResumeHook()),
    )
    for hook in own_hooks:
        if not any(isinstance(own, type(hook)) for own in runner.hooks):
            runner.register_hook(hook)
    for hook in runner.hooks:
        if isinstance(hook, ConditioningGuardHook):  # the configuration may have one of its own
            hook.allow_other |= other_conditioning
    return runner


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``, or the best one of this machine.

    Raises:
        UserError: If there is no such device.
    """
    try:
        return torch.empty(0, device=name or get_device()).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}; this machine's default is {get_device()}") from error
