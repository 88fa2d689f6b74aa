"""The configuration of a model whose corrections of weights are merged into the weights."""

import copy

from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import Registry, root
from torch import nn

from ...methods.parsing import DEFAULT, parse
from ...methods.weight import WeightMethod
from ..data_check.settings import as_list
from ..errors import UserError
from ..models.base import PRETRAINED_SETTINGS, pretrained_entry
from ..models.loading import difference, record_of
from ..models.settings import class_name, conditioned_parts, module_settings, parts
from .launch import build_model

OWN = __name__.partition(".")[0]
"""Name of this package."""
UPSTREAM = {
    "ConditionedSwinTransformer": "SwinTransformer",
    "ConditionedVisionTransformer": "mmseg.VisionTransformer",  # mmdet has no class of this name
}
"""Conditioned subclass -> the class that it is derived from."""
OWN_SETTINGS = ("conditioning", "fast_attention")
"""Settings of a conditioned subclass that upstream's class does not have."""


def fold_config(cfg: Config) -> Config:
    """Make the configuration of the model of ``cfg`` after :func:`condattn.fold`.

    The methods that were merged, and those that only set initial weights, are removed from every ``conditioning``. A
    part of the model without any other method becomes upstream's own where there is one. This project is imported only
    if a class of it is left, see :func:`own_classes`.
    """
    cfg = copy.deepcopy(cfg)
    for part in reversed(conditioned_parts(cfg.model)):  # inner parts first, as outer ones may become them
        _fold_part(part)
    if cfg.get("custom_imports") and not own_classes(cfg):
        imports = [name for name in as_list(cfg.custom_imports.get("imports")) if name.partition(".")[0] != OWN]
        if imports:
            cfg.custom_imports.imports = imports
        else:
            cfg.pop("custom_imports")
    return cfg


def own_classes(cfg: Config) -> list[str]:
    """Names of the classes of this project that ``cfg`` uses in its model, data sets, hooks, or elsewhere."""
    registries = [one for one in vars(root).values() if isinstance(one, Registry)]
    registered = [one.module_dict for registry in registries for one in (registry, *registry.children.values())]
    own = {name for classes in registered for name, cls in classes.items() if cls.__module__.partition(".")[0] == OWN}
    return sorted(own & {class_name(part) for _, part in parts(cfg.to_dict())})


def _fold_part(part: ConfigDict) -> None:
    methods = parse(part.get("conditioning", DEFAULT))
    left = [method for method in methods if method.changes_function and not isinstance(method, WeightMethod)]
    name = class_name(part)
    if left:
        part.conditioning = "+".join(map(str, left))
    elif name == "Conditioned":
        module = module_settings(part)
        part.clear()
        part.update(module)
        for _, inside in parts(part):
            _drop_own_settings(inside)
    elif name in UPSTREAM:
        scope = part.type.removesuffix(name) if isinstance(part.type, str) else ""
        part.type = UPSTREAM[name] if "." in UPSTREAM[name] else scope + UPSTREAM[name]
        for key in OWN_SETTINGS:
            part.pop(key, None)
        _drop_own_settings(part)
    else:
        part.conditioning = "none"


def _drop_own_settings(part: dict) -> None:
    """Remove the settings of pretrained weights that mmengine does not have."""
    entry = pretrained_entry(part.get("init_cfg")) or {}
    for key in PRETRAINED_SETTINGS:
        entry.pop(key, None)


def rebuild(cfg: Config, folded: nn.Module) -> nn.Module:
    """Build the model of ``cfg``, made by :func:`fold_config`, with the weights of ``folded``.

    Raises:
        UserError: If it cannot be built, has other weights, or is conditioned otherwise.
    """
    model = revert_sync_batchnorm(build_model(cfg))
    try:
        model.load_state_dict(folded.state_dict())
    except RuntimeError as error:
        raise UserError(f"the configuration of the folded model is of another model: {error}") from error
    if problem := difference(record_of(folded), model, "the folded checkpoint is"):
        raise UserError(problem)
    return model.to(next(folded.parameters()).device).eval()
