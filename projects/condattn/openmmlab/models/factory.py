"""Build and condition any registered module from a config."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch import nn

from ...condition import condition
from ...methods.initial_weights import InitialWeightsMethod
from ...methods.parsing import DEFAULT, Conditioning
from .base import (
    PRETRAINED_SETTINGS,
    initialize_as_upstream,
    is_pretrained,
    load_as_configured,
    pretrained_entry,
    refuse_initial_weights,
)
from .loading import TRAINED_WITH, check_start, guard_loading, recorded
from .settings import module_settings


@MODELS.register_module()
def Conditioned(
    module: str | Mapping[str, Any] | nn.Module,
    conditioning: Conditioning = DEFAULT,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    data_preprocessor: Mapping[str, Any] | None = None,
    **settings: Any,
) -> nn.Module:
    """Build ``module``, a whole detector or any part of a model, in the current scope and condition its attention.

    Config, where the base has ``model = dict(type='DETR', ...)``::

        model = dict(type='Conditioned', module='DETR', conditioning='pc', include=['decoder'])

    Args:
        module: The type of the module, whose own settings are beside it, as tools of OpenMMLab expect those of a
            detector; or the config of the module; or the module itself.
        conditioning: See :func:`condattn.condition`. Default: ``'pc'``.
        include: Glob patterns of the module names to condition; default: every attention site.
        exclude: Glob patterns of module names to leave out.
        data_preprocessor: Passed on to ``module``, unless that has its own: mmengine's runner gives a model the
            config's ``data_preprocessor`` in this way.
        **settings: The settings of the module; they replace those in its config.

    An ``init_cfg`` of type 'Pretrained', of the module or of a part of it, may have the settings of
    :class:`.base.ConditionedBackbone`, and is refused if its weights were trained with another conditioning.

    Returns:
        The module itself, conditioned in place.

    Raises:
        ValueError: As :func:`condattn.condition`, for settings of a module that is built already, and for a
            conditioning that sets initial weights of a module that loads pretrained weights when it is built.
    """
    loaded: list[nn.Module] = []
    if not isinstance(module, nn.Module):
        cfg = module_settings(dict(settings, module=module, data_preprocessor=data_preprocessor))
        module = MODELS.build(cfg)
        loaded = _loaded(module, cfg)
    elif settings:
        raise ValueError(f"Conditioned has {', '.join(settings)} beside a module that is built already; leave that out")
    report = condition(module, conditioning, include, exclude)
    for part in loaded:
        refuse_initial_weights(part)
    guard_loading(module)
    own = any(isinstance(method, InitialWeightsMethod) for method in report.methods) and hasattr(module, "init_weights")
    for part in module.modules():
        init_cfg = getattr(part, "init_cfg", None)
        pretrained = is_pretrained(init_cfg) and not getattr(part, "checks_its_weights", False)
        if pretrained or (own and part is module):
            part.init_weights = partial(_init_weights, part)
        if pretrained:
            part.checks_its_weights = _has_own_settings(init_cfg)
    print_log(f"{type(module).__name__}: {report}", logger="current")
    return module


def _loaded(module: nn.Module, cfg: Mapping[str, Any]) -> list[nn.Module]:
    """The parts of a module that has just been built from ``cfg`` whose weights are pretrained.

    Wrappers of other libraries (``TIMMBackbone``, ``TimmClassifier``) load them before ``init_weights``.
    """
    if cfg.get("pretrained") is True or cfg.get("checkpoint_path"):
        return [module]
    return [part for part in module.modules() if getattr(part, "is_init", False) is True]


def _has_own_settings(init_cfg: Any) -> bool:
    """Whether the entry of type 'Pretrained' of an ``init_cfg`` has settings that mmengine does not have."""
    return not (pretrained_entry(init_cfg) or {}).keys().isdisjoint(PRETRAINED_SETTINGS)


def _init_weights(module: nn.Module) -> None:
    """Initialise a conditioned module, or a part of one, as its class does, and then as the conditioning does.

    Pretrained weights are loaded by the module's own class, unless their ``init_cfg`` has settings of this project.
    Either way their record of conditioning is compared and kept.
    """
    pretrained = pretrained_entry(init_cfg := getattr(module, "init_cfg", None))
    if _has_own_settings(init_cfg):
        load_as_configured(module, init_cfg)
        return
    if pretrained:
        checkpoint = CheckpointLoader.load_checkpoint(pretrained["checkpoint"], "cpu")
        check_start(checkpoint, pretrained["checkpoint"], module, "raw")
        setattr(module, TRAINED_WITH, recorded(checkpoint))
        del checkpoint  # read again by the module's class
    initialize_as_upstream(module, lambda: type(module).init_weights(module))
