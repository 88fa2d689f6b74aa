"""Find what mmengine's runner would answer with a traceback, after it has written its first files."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from mmengine.config import Config
from mmengine.registry import (
    EVALUATOR,
    HOOKS,
    LOOPS,
    METRICS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    VISUALIZERS,
    Registry,
)

from ...wording import shown
from ..data_check.settings import as_list, class_of, leaves, misshapen
from ..errors import UserError
from ..models.settings import class_name

NEEDED = {
    "train": ("train_dataloader", "train_cfg", "optim_wrapper"),
    "val": ("val_dataloader", "val_cfg", "val_evaluator"),
    "test": ("test_dataloader", "test_cfg", "test_evaluator"),
}
"""Loop -> the settings without which it cannot run."""
WORDS = {"train": "a training", "val": "a validation", "test": "an evaluation"}


def check_loop(cfg: Config, loop: str) -> None:
    """Check that ``cfg`` has all settings of a loop, and that the types of what it runs are registered.

    Args:
        cfg: The configuration.
        loop: 'train', 'val' or 'test'. A configuration may have no setting of 'val' at all.

    Raises:
        UserError: If a setting is missing, or a type is unknown; the message names the setting.
    """
    missing = [name for name in NEEDED[loop] if cfg.get(name) is None]
    if missing and not (loop == "val" and len(missing) == len(NEEDED[loop])):
        advice = ", or set all three to None" if loop == "val" else ""
        raise UserError(
            f"{cfg.filename}: settings that {WORDS[loop]} needs are missing: {', '.join(missing)}; add them{advice}"
        )
    for path, settings, registries in _typed(cfg, loop):
        kind = settings.get("type") if isinstance(settings, dict) else None
        if kind is not None and not isinstance(kind, str) and not callable(kind):
            raise UserError(
                f"{cfg.filename}: {path}.type: expected the name of a class, found {shown(kind)}; write it so"
            )
        if not isinstance(settings, dict) or not isinstance(settings.get("type"), str):
            continue
        if all(class_of(settings, registry) is None for registry in registries):
            name = class_name(settings)
            known = {key.lower(): key for registry in registries for key in _names(registry)}
            similar = [known[key] for key in get_close_matches(name.lower(), known, n=1)]
            raise UserError(
                f"{cfg.filename}: {path}.type: no {name!r} is registered"
                + (f"; did you mean {similar[0]!r}?" if similar else "; import its module with custom_imports")
            )


def _typed(cfg: Config, loop: str) -> Iterator[tuple[str, Any, tuple[Registry, ...]]]:
    """Yield settings that have a type: their path, the settings, and the registries of which one has the type."""
    for name, hook in (cfg.get("default_hooks") or {}).items():
        yield f"default_hooks.{name}", hook, (HOOKS,)
    for i, hook in enumerate(as_list(cfg.get("custom_hooks"))):
        yield f"custom_hooks[{i}]", hook, (HOOKS,)
    yield "visualizer", cfg.get("visualizer"), (VISUALIZERS,)
    yield f"{loop}_cfg", cfg.get(f"{loop}_cfg"), (LOOPS,)
    if loop == "train":
        wrapper = cfg.optim_wrapper
        yield "optim_wrapper", wrapper, (OPTIM_WRAPPERS,)
        yield "optim_wrapper.optimizer", wrapper.get("optimizer"), (OPTIMIZERS,)
        for i, scheduler in enumerate(as_list(cfg.get("param_scheduler"))):
            yield f"param_scheduler[{i}]", scheduler, (PARAM_SCHEDULERS,)
    for i, evaluator in enumerate(as_list(cfg.get(f"{loop}_evaluator"))):
        yield f"{loop}_evaluator[{i}]", evaluator, (METRICS, EVALUATOR)
    dataset = (cfg.get(f"{loop}_dataloader") or {}).get("dataset")
    if dataset and not any(misshapen(dataset, "")):
        for leaf in leaves(dataset):
            for i, step in enumerate(leaf.get("pipeline") or ()):
                yield f"{loop}_dataloader: pipeline[{i}]", step, (TRANSFORMS,)


def _names(registry: Registry) -> set[str]:
    """Names of all classes in a registry and in those of the toolboxes below it."""
    return set(registry.module_dict).union(*(_names(child) for child in registry.children.values()))
