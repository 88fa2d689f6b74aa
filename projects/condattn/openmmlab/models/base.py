"""The mixin of conditioned backbones, and functions that initialise them and load their pretrained weights."""

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.model import PretrainedInit
from mmengine.model import initialize as initialize_by
from torch import nn

from ...condition import condition, conditioned_places, initialize
from ...layers.correction import is_correction
from ...methods.initial_weights import InitialWeightsMethod
from ...methods.parsing import DEFAULT, Conditioning
from ...weights.files import describe_wrong_hash, read_file, weights_of
from ...weights.load import LoadReport, load_weights
from .loading import TRAINED_WITH, check_start, guard_loading, recorded

TIMM = "timm:"
"""Prefix of a checkpoint that is the name of a timm model: its public weights, which timm downloads."""
PRETRAINED_SETTINGS = ("load", "unsafe", "other_conditioning")
"""Settings of an ``init_cfg`` of type 'Pretrained' that mmengine does not have."""


class ConditionedBackbone:
    """Mixin to be placed before an upstream backbone class; it adds the argument ``conditioning``.

    ``init_cfg=dict(type='Pretrained', checkpoint=FILE)`` loads the weights of any release of the same network, see
    :func:`condattn.weights.load.load_pretrained`. With ``load='effective'`` in addition, spectral correction does not
    change the function of weights that were trained without it.

    Args:
        conditioning: How the attention is conditioned; see :func:`condattn.condition`. ``'none'`` is the upstream
            backbone, bit for bit; Swin only with ``fast_attention=False``, and otherwise equal up to rounding.
            Default: ``'pc'``.
        **kwargs: Arguments of the upstream class.

    Raises:
        ValueError: If the conditioning is unknown or invalid.
    """

    checks_its_weights = True

    def __init__(self, *args, conditioning: Conditioning = DEFAULT, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        report = condition(self, conditioning)
        guard_loading(self)
        print_log(f"{type(self).__name__}: {report}", logger="current")

    def init_weights(self) -> None:
        """Initialise as upstream does, but accept pretrained weights with the parameter names of any release.

        Raises:
            ValueError: If the pretrained weights cannot be read, or are of another model.
        """
        if is_pretrained(self.init_cfg):
            load_as_configured(self, self.init_cfg)
        else:
            initialize_as_upstream(self, super().init_weights)

    def train(self, mode: bool = True):
        """Set the training mode and return self, as ``nn.Module`` does and upstream's backbones do not."""
        super().train(mode)
        return self


def pretrained_entry(init_cfg: Any) -> dict[str, Any] | None:
    """The dictionary in an ``init_cfg`` of mmengine, which may be a list, that asks for pretrained weights, or None."""
    kinds = ("Pretrained", PretrainedInit)
    dicts = (entry for entry in _entries(init_cfg) if isinstance(entry, dict))
    return next((entry for entry in dicts if entry.get("type") in kinds), None)


def without_pretrained(init_cfg: Any) -> list[dict[str, Any]] | None:
    """The other entries of an ``init_cfg``; None if there are none."""
    pretrained = pretrained_entry(init_cfg)
    return [entry for entry in _entries(init_cfg) if entry is not pretrained] or None


def _entries(init_cfg: Any) -> list[Any]:
    return list(init_cfg) if isinstance(init_cfg, list | tuple) else [init_cfg]


def is_pretrained(init_cfg: Any) -> bool:
    """Whether an ``init_cfg`` of mmengine asks for pretrained weights."""
    return pretrained_entry(init_cfg) is not None


def initialize_as_upstream(model: nn.Module, init_weights: Callable[[], None]) -> None:
    """Call ``init_weights`` to initialise ``model``, then apply the methods that set initial weights.

    Raises:
        ValueError: If pretrained weights would replace the weights that such a method sets.
    """
    pretrained = [module for module in model.modules() if is_pretrained(getattr(module, "init_cfg", None))]
    for module in pretrained:
        refuse_initial_weights(module)
    done = getattr(model, "is_init", False)
    init_weights()
    if not done:  # mmengine initialises a model only once
        initialize(model)


def refuse_initial_weights(model: nn.Module, loaded: Collection[str] | None = None) -> None:
    """Check that no method sets initial weights of ``model``, into which pretrained weights are loaded.

    Args:
        model: The model.
        loaded: Names of the weights that are loaded. Default: all.

    Raises:
        ValueError: If one does.
    """
    for place, method in conditioned_places(model):
        prefix = f"{place.name}." if place.name else ""
        replaced = loaded is None or any(name.startswith(prefix) for name in loaded)
        if isinstance(method, InitialWeightsMethod) and replaced:
            raise ValueError(
                f"{place}: conditioning={str(method)!r} sets initial weights, which the pretrained weights would "
                "replace; train from scratch, or leave the method out"
            )


def load_as_configured(model: nn.Module, init_cfg: Any, known: Collection[str] = ()) -> LoadReport:
    """Load the weights that an ``init_cfg`` with an entry of type 'Pretrained' names into ``model``; log the result.

    Other entries of ``init_cfg`` initialise the model before, as in mmengine.

    Raises:
        ValueError: As :func:`condattn.weights.load.load_pretrained`, and for unknown settings.
    """
    refuse_initial_weights(model)
    if others := without_pretrained(init_cfg):
        initialize_by(model, others)
    entry = pretrained_entry(init_cfg) or {}
    settings = {name: value for name, value in entry.items() if name not in ("type", "map_location")}
    known_settings = ("checkpoint", *PRETRAINED_SETTINGS, "prefix")
    if unknown := settings.keys() - set(known_settings):
        raise ValueError(
            f"init_cfg of type 'Pretrained' has {', '.join(sorted(unknown))}; its settings are "
            f"{', '.join(known_settings)}"
        )
    if not isinstance(path := settings.pop("checkpoint", None), str | Path):
        raise ValueError(f"init_cfg of type 'Pretrained' expects checkpoint=FILE_OR_ADDRESS, found {path!r}")
    checkpoint = read_file(path, settings.get("unsafe", False))
    weights, beside, where = weights_of(checkpoint, path, settings.get("prefix") or "")
    if settings.get("other_conditioning", False):
        own = model.state_dict()
        other = [
            key for key, value in weights.items() if is_correction(key) and own.get(key, value[:0]).shape != value.shape
        ]
        weights, beside = {key: value for key, value in weights.items() if key not in other}, [*beside, *other]
    else:
        check_start(checkpoint, path, model, settings.get("load", "raw"))
    setattr(model, TRAINED_WITH, recorded(checkpoint))
    report = load_weights(model, weights, str(path), settings.get("load", "raw"), known)
    report.path, report.left_out = where, report.left_out + beside
    if wrong := describe_wrong_hash(path):
        print_log(wrong, logger="current", level=logging.WARNING)
    print_log(f"pretrained weights {report}", logger="current")
    return report
