"""What a method is, the registry of methods, and how a host layer becomes a conditioned one."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from ..classes import qualified_name
from ..sites import AttentionSite

_METHODS: dict[str, type[Method]] = {}
_ALIASES: dict[str, str] = {}


class Method(ABC):
    """One way to condition an attention site; a dataclass whose fields are the settings.

    Subclasses implement :meth:`check`, :meth:`apply` and :meth:`applied_to`, and are registered with
    :func:`register_method`.
    """

    alias: ClassVar[str]

    @abstractmethod
    def check(self, site: AttentionSite) -> None:
        """Raise a one-line ``ValueError`` if ``site`` cannot be conditioned; change nothing."""

    @abstractmethod
    def apply(self, site: AttentionSite) -> None:
        """Condition ``site`` in place. :meth:`check` has passed."""

    @classmethod
    @abstractmethod
    def applied_to(cls, site: AttentionSite) -> Method | None:
        """The method of this class that conditions ``site`` now, or None."""

    def to_dict(self) -> dict[str, Any]:
        """The settings in the long form of a config: ``dict(type=..., ...)``; ``parse`` reads it back."""
        return {"type": type(self).__name__, **dataclasses.asdict(self)}


def register_method(cls: type[Method]) -> type[Method]:
    """Class decorator: make ``cls`` buildable from a config by its name and by its ``alias``.

    Raises:
        ValueError: If the name or the alias is taken.
    """
    for name in (cls.__name__, cls.alias):
        if name in _METHODS or name in _ALIASES:
            raise ValueError(f"the conditioning method name {name!r} is taken; choose another")
    _METHODS[cls.__name__] = cls
    _ALIASES[cls.alias] = cls.__name__
    return cls


def registered_methods() -> list[type[Method]]:
    """The registered method classes, in order of registration."""
    return list(_METHODS.values())


Conditioning = str | Method | Mapping[str, Any] | Sequence[Any] | None


def parse(conditioning: Conditioning) -> list[Method]:
    """Build the methods that a ``conditioning`` setting names.

    Args:
        conditioning: ``'none'`` or None; an alias (``'pc'``, ``'sc'``) or several joined by ``+``; the long form
            ``dict(type='SpectralCorrection', strength=1.0)``; a :class:`Method`; or a list of these.

    Returns:
        The methods in the order given; empty for ``'none'``.

    Raises:
        ValueError: For an unknown name, an invalid setting, or the same method twice.
    """
    methods = _build(conditioning)
    names = [type(method).__name__ for method in methods]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"conditioning names {', '.join(sorted(repeated))} more than once; give each method once")
    return methods


def _build(conditioning: Conditioning) -> list[Method]:
    if conditioning is None or conditioning == "none":
        return []
    if isinstance(conditioning, Method):
        return [conditioning]
    if isinstance(conditioning, str):
        return [_lookup(name.strip())() for name in conditioning.split("+")]
    if isinstance(conditioning, Mapping):
        settings = dict(conditioning)
        cls = _lookup(settings.pop("type", None))
        try:
            return [cls(**settings)]
        except TypeError as error:
            fields = ", ".join(field.name for field in dataclasses.fields(cls))
            raise ValueError(f"{cls.__name__}: {error}; its settings are {fields}") from None
    if isinstance(conditioning, Sequence):
        return [method for item in conditioning for method in _build(item)]
    raise ValueError(
        f"conditioning is {conditioning!r}; expected a name, a dict(type=...), or a list of these. {_known()}"
    )


def _lookup(name: Any) -> type[Method]:
    name = _ALIASES.get(name, name)
    if name not in _METHODS:
        raise ValueError(f"unknown conditioning {name!r}. {_known()}")
    return _METHODS[name]


def _known() -> str:
    names = ", ".join(f"'{alias}' ({name})" for alias, name in _ALIASES.items())
    return f"Known: {names}, several of them joined by '+', and 'none' by itself"


# Wrappers that differ from what they wrap in versions of torch below 1.5 alone.
SAME = ("mmcv.cnn.bricks.wrappers.Linear", "mmcv.cnn.bricks.wrappers.Conv2d")


def check_can_become(owner: nn.Module, layer: type[nn.Module], site: AttentionSite) -> None:
    """Raise a one-line ``ValueError`` unless ``owner`` can become a ``layer``, whose host class is ``layer.host``.

    It can if it is the host class in all but the name, and its parameters are its own.
    """
    if isinstance(owner, layer):
        return
    classes = type(owner).__mro__
    added = classes[: classes.index(layer.host)] if layer.host in classes else classes
    added = [cls for cls in added if qualified_name(cls) not in SAME]
    if nn.utils.parametrize.is_parametrized(owner):
        problem = f"parametrized {layer.host.__name__}"
    elif any(callable(member) and name != "__init__" for cls in added for name, member in vars(cls).items()):
        problem = f"{type(owner).__name__}, which has methods that {layer.host.__name__} has not"
    else:
        return
    raise ValueError(f"{site}: cannot condition its {problem}; {leave_out(site)}")


def leave_out(site: AttentionSite) -> str:
    """The advice that ends a refusal to condition ``site``."""
    return f"leave the site out with exclude=[{site.name!r}]"


class ConditionedLayer:
    """Mixin of the classes that layers become in place, see :func:`become`; ``host`` is the class they had."""

    host: ClassVar[type[nn.Module]]

    def __new__(cls, *args, **kwargs) -> Any:
        """A plain layer for who builds one more of this class, as PEFT's adapters do; copies have no arguments."""
        return cls.host(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __prepare_scriptable__(self) -> None:
        refuse_scripting()


def refuse_scripting() -> None:
    """What ``torch.jit.script`` calls of a module that is conditioned.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        "torch.jit.script cannot compile conditioned attention; use torch.jit.trace, torch.export or torch.compile, or "
        "condattn.fold(model) before, which leaves plain layers where spectral correction is the only method"
    )


def become(owner: nn.Module, layer: type[nn.Module]) -> Any:
    """Turn ``owner`` in place into an instance of ``layer``, a subclass of its class, and return it.

    The object stays the same one: parameters, buffers, hooks, optimizer groups and references to it all remain.
    """
    if not isinstance(owner, layer):
        owner.host_class = type(owner)
        owner.__class__ = layer
    return owner


def restore(owner: nn.Module) -> None:
    """Undo :func:`become`."""
    owner.__class__ = owner.__dict__.pop("host_class")
