"""Record a model's conditioning with its weights, and refuse to load them into a model conditioned otherwise.

The record is stored twice: in a checkpoint's ``meta``, which the tools read, and in the metadata of its state dict, in
which torch stores the version of each module. ``load_state_dict`` of torch and mmengine, and mmdet's and mmseg's
inferencers, pass this metadata to each module. The state dict of a model in memory has no record:
``one.load_state_dict(other.state_dict())`` copies weights whatever the conditioning of the two models.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from ...attention.rules import find_sites
from ...condition import conditioning_of, same_conditioning
from ...methods.base import Method, method_class, registered_methods
from ...methods.head_output import HeadOutputMethod
from ...methods.parsing import parse
from ...methods.weight import WeightMethod
from ...weights.files import weights_of
from ...weights.names import Format, recognize, translate
from ...wording import some
from ..errors import UserError
from .wrapping import unwrapped

ENTRY = "conditioning"
"""Key of the record in ``meta`` and in a module's metadata."""
TRAINED_WITH = "trained_with"
"""Name of the attribute of a module that holds the record of the weights which were loaded into it, if they had one."""
Record = Mapping[str, list[dict[str, Any]]]


def record_of(model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """The record of the conditioning of ``model``: site name -> its methods, as plain data."""
    return conditioning_of(unwrapped(model))


def recorded(checkpoint: Any) -> Record:
    """The record in a checkpoint; empty if it has none."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, Mapping) else None
    return (meta.get(ENTRY) if isinstance(meta, Mapping) else None) or {}


def methods_in(record: Record, kind: type[Method]) -> list[str]:
    """Names of the methods in ``record`` that are subclasses of ``kind``."""
    names = {method.get("type") for methods in record.values() for method in methods}
    return sorted(names & {cls.__name__ for cls in registered_methods() if issubclass(cls, kind)})


def inconvertible(record: Record) -> list[str]:
    """Names of the methods in ``record`` for which no weights can be made from weights without conditioning.

    They change the function of the model otherwise than by head outputs or by weights.
    """
    kinds = (HeadOutputMethod, WeightMethod)
    changing = methods_in(record, Method)
    return [
        name for name in changing if method_class(name).changes_function and not issubclass(method_class(name), kinds)
    ]


def check_conditioning(checkpoint: Mapping[str, Any], path: str, model: nn.Module) -> None:
    """Check that ``model`` has the conditioning of the model that ``checkpoint``, read from ``path``, was saved from.

    A checkpoint without a record counts as that of a model without conditioning.

    Raises:
        UserError: If it has not; the message shows both conditionings, and the line of the configuration to change.
    """
    if problem := difference(recorded(checkpoint), unwrapped(model), f"{path} is"):
        raise UserError(f"{problem}, or load it all the same with --other-conditioning")


def check_start(checkpoint: Any, path: str, model: nn.Module, load: str) -> None:
    """Check that the weights from which ``model`` starts (``init_cfg``) were trained with its conditioning.

    Weights that were trained without conditioning are accepted by every model.

    Raises:
        ValueError: If the file records another conditioning, or records corrections while ``load`` is 'effective'.
    """
    record = recorded(checkpoint)
    if not any(record.values()):
        return
    if load == "effective" and (found := methods_in(record, WeightMethod)):
        raise ValueError(
            f"{path} was trained with corrected weights ({', '.join(found)}); load='effective' is for weights that "
            "were not"
        )
    if problem := difference_from(checkpoint, path, model):
        raise ValueError(f"{problem}, or load it all the same with other_conditioning=True in the init_cfg")


def difference_from(checkpoint: Any, path: str, model: nn.Module) -> str:
    """As :func:`difference`, from the record in a checkpoint, which may be of another library's model; '' without one.

    Args:
        checkpoint: The content of the checkpoint.
        path: Where it was read from.
        model: The model.
    """
    record = recorded(checkpoint)
    return difference(_in_names_of(model, record, checkpoint), model, f"{path} is") if any(record.values()) else ""


def guard_loading(module: nn.Module) -> None:
    """Make ``module`` raise a ``ValueError`` when it loads weights that were saved with another conditioning.

    The record of the weights that it loads is kept for :func:`trained_with`.
    """
    module.refuses_other_conditioning = True
    module.register_load_state_dict_pre_hook(_refuse)


def trained_with(model: nn.Module, kind: type[Method]) -> list[str]:
    """Names of the methods of ``kind`` that the weights which ``model`` has loaded were trained with, as recorded."""
    records = [getattr(module, TRAINED_WITH, {}) for module in model.modules()]
    return sorted({name for record in records for name in methods_in(record, kind)})


def with_record(state_dict: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """Return a copy of ``state_dict`` with a record for every module of ``model`` guarded by :func:`guard_loading`."""
    recorded = OrderedDict(state_dict)
    recorded._metadata = {name: dict(entries) for name, entries in getattr(state_dict, "_metadata", {}).items()}
    for name, module in model.named_modules():
        if getattr(module, "refuses_other_conditioning", False):
            recorded._metadata.setdefault(name, {})[ENTRY] = conditioning_of(module)
    return recorded


def drop_record(state_dict: Mapping[str, Tensor]) -> None:
    """Remove the record from ``state_dict``, in place, so that modules with any conditioning load it."""
    for entries in getattr(state_dict, "_metadata", {}).values():
        entries.pop(ENTRY, None)


def difference(record: Record, model: nn.Module, source: str) -> str:
    """Describe how the conditioning of ``model`` differs from ``record``, and what to do; '' if it does not differ.

    Args:
        record: The record of the model, or of a larger model that contains it, whose names have a prefix.
        model: The model.
        source: The beginning of the message: where the record comes from, and a verb, such as 'a.pth is'.
    """
    own, theirs = conditioning_of(model), dict(_within(record, model))
    places = {**own, **{name: [] for name, methods in theirs.items() if methods and name not in own}}
    other = [name for name in places if not same_conditioning(theirs.get(name, []), places[name])]
    if not other:
        return ""
    sites = [site.name for site in find_sites(model)]
    example = next((name for name in [*other, *sites] if name in sites), None)
    together = [name for name in places if name == example or name not in sites]
    before, now = (_as_setting(_methods_at(together, entries)) for entries in (theirs, places))
    advice = f"set conditioning={before} in the configuration to load it as it was trained"
    if before == "'none'" and not inconvertible(own):
        advice += ", or make a conditioned checkpoint of it with tools/checkpoints/calibrate.py"
    names = some((name or "(the model itself)" for name in other), 2)
    return (
        f"{source} of a model with conditioning={before} at {len(other)} of {len(places)} places ({names}), "
        f"where this one has conditioning={now}, so that its weights mean something else here: {advice}"
    )


def _within(record: Record, model: nn.Module) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the entries of ``record`` that belong to ``model``, with their names in ``model``."""
    modules = dict(model.named_modules())
    prefix = _prefix(record, conditioning_of(model))
    for key, methods in record.items():
        name = "" if f"{key}." == prefix else key.removeprefix(prefix)
        if f"{key}.".startswith(prefix) and name in modules:
            yield name, methods


def _prefix(record: Record, own: Record) -> str:
    """The prefix of names in ``record`` before those in ``own``, the conditioning of the model; '' if there is none."""
    for name in own:
        if name in record:
            return ""
        for key in record:
            if name and key.endswith(f".{name}"):
                return key.removesuffix(name)
    return ""


def _in_names_of(model: nn.Module, record: Record, checkpoint: Any) -> Record:
    """The record of ``checkpoint``, which may be of another library's model, with the names that ``model`` has."""
    weights, _, _ = weights_of(checkpoint)
    source, target = recognize(weights), recognize(model.state_dict())
    if not source or not target or source == target or source.family != target.family:
        return record
    return renamed_record(record, weights, source, target)


def renamed_record(record: Record, weights: Mapping[str, Tensor], source: Format, target: Format) -> Record:
    """The record of a model in the naming format ``source``, which has ``weights``, with the names of ``target``."""
    renamed = {}
    for key, methods in record.items():
        parts = key.split(".")
        names = (
            ".".join(parts[start:]) for start in range(len(parts))
        )  # the record has the prefixes of the whole model
        inside = next(
            (found for name in names if (found := {w: v for w, v in weights.items() if w.startswith(f"{name}.")})), {}
        )
        translated, _ = translate(inside, source, target)
        levels = zip(*(name.split(".")[:-1] for name in translated), strict=False)
        common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
        renamed[".".join(common) or key] = methods
    return renamed


def _methods_at(names: list[str], record: Record) -> list[dict[str, Any]]:
    """The methods that ``record`` has at ``names``, each once: one value of ``conditioning`` sets them all."""
    methods = [method for name in names for method in record.get(name, [])]
    return [method for index, method in enumerate(methods) if method not in methods[:index]]


def _as_setting(methods: list[dict[str, Any]]) -> str:
    """Format methods as the value of ``conditioning`` in a configuration, or as recorded if unknown."""
    try:
        return repr("+".join(map(str, parse(methods))) or "none")
    except ValueError:
        return repr(methods)


def _refuse(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, local_metadata: dict, *_: Any) -> None:
    """Raise if ``local_metadata`` records another conditioning than that of ``module``; a pre-hook of loading."""
    if ENTRY not in local_metadata:
        return
    source = f"the checkpoint of {prefix.rstrip('.') or 'the model'} is"
    if problem := difference(local_metadata[ENTRY], module, source):
        raise ValueError(f"{problem}, or let tools/predict.py or tools/test.py load it with --other-conditioning")
    setattr(module, TRAINED_WITH, local_metadata[ENTRY])
