"""Weights that a run has saved know the conditioning of their backbone, and every other one refuses to load them.

The record is in the metadata that a state dict has for each module, beside torch's version of it, because that is what
``load_state_dict`` of torch, mmengine, and mmdet's and mmseg's inferencers hand to a module. The state dict of a model
in memory has no record: ``one.load_state_dict(other.state_dict())`` copies weights, whatever the two are.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...condition import conditioning_of, same_conditioning

ENTRY = "conditioning"
Record = dict[str, list[dict[str, Any]]]


def guard_loading(module: nn.Module) -> None:
    """Let ``module`` refuse weights that were saved with another conditioning, with a ``ValueError``."""
    module.refuses_other_conditioning = True
    module.register_load_state_dict_pre_hook(_refuse)


def with_record(state_dict: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """The weights of ``model`` with the conditioning of every module in it that :func:`guard_loading` guards."""
    recorded = OrderedDict(state_dict)
    recorded._metadata = {name: dict(entries) for name, entries in getattr(state_dict, "_metadata", {}).items()}
    for name, module in model.named_modules():
        if getattr(module, "refuses_other_conditioning", False):
            recorded._metadata.setdefault(name, {})[ENTRY] = conditioning_of(module)
    return recorded


def drop_record(state_dict: Mapping[str, Tensor]) -> None:
    """Let every module load ``state_dict``, however it is conditioned."""
    for entries in getattr(state_dict, "_metadata", {}).values():
        entries.pop(ENTRY, None)


def difference(record: Record, model: nn.Module) -> str:
    """How the conditioning of the first site of ``model`` that differs from ``record`` does, as text; or ''.

    Sites of the record may have a longer name.
    """
    for name, methods in conditioning_of(model).items():
        theirs = next((record[site] for site in record if f".{site}".endswith(f".{name}")), [])
        if not same_conditioning(theirs, methods):
            return f"conditioning={theirs or 'none'} at {name}, where this backbone has {methods or 'none'}"
    return ""


def _refuse(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, local_metadata: dict, *_: Any) -> None:
    if ENTRY in local_metadata and (different := difference(local_metadata[ENTRY], module)):
        raise ValueError(
            f"these weights of {prefix.rstrip('.') or 'the model'} were trained with {different}, so that they mean "
            "something else here; condition it alike, or let tools/predict.py or tools/test.py load them with "
            "--other-conditioning"
        )
