"""What a method is, the registry of methods, and how a host layer becomes a conditioned one."""

from __future__ import annotations

import ast
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..attention.site import AttentionSite

DEFAULT = "pc"
"""The conditioning where none is named."""

_METHODS: dict[str, type[Method]] = {}
_ALIASES: dict[str, str] = {}


class Method(ABC):
    """One way to condition an attention site; a dataclass whose fields are the settings.

    Subclasses implement :meth:`check`, :meth:`apply` and :meth:`applied_to`, :meth:`remove` if it is to be undone, and
    are registered with :func:`register_method`.

    Attributes:
        alias: Short name.
        alias_settings: Settings that the short name stands for, where they are not the defaults of the class.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    alias: ClassVar[str]
    alias_settings: ClassVar[Mapping[str, Any]] = {}

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

    def parts(self, site: AttentionSite) -> str:
        """What of ``site`` the method conditions, for a table of sites; :meth:`check` has passed."""
        return "yes"

    @classmethod
    def remove(cls, site: AttentionSite) -> None:
        """Undo :meth:`apply` of the method that conditions ``site`` now; the trained weights stay as they are.

        Raises:
            NotImplementedError: If the method does not say how.
        """
        raise NotImplementedError(f"{site}: {cls.__name__} cannot be removed: the class does not define remove")

    def __str__(self) -> str:
        """The method as :func:`parse` reads it back: 'pc', or 'sc(strength=3.0, relative=True)'."""
        usual = type(self)(**self.alias_settings)
        names = [field.name for field in dataclasses.fields(self)]
        changed = [name for name in names if getattr(self, name) != getattr(usual, name)]
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in changed)
        return f"{self.alias}({settings})" if settings else self.alias

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
        conditioning: ``'none'`` or None; an alias (``'pc'``, ``'sc'``), perhaps with settings
            (``'sc(strength=3.0, relative=True)'``), or several joined by ``+``; the long form
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
        return [_instance(name, settings) for name, settings in _read(conditioning)]
    if isinstance(conditioning, Mapping):
        settings = dict(conditioning)
        return [_instance(settings.pop("type", None), settings)]
    if isinstance(conditioning, Sequence):
        return [method for item in conditioning for method in _build(item)]
    raise ValueError(
        f"conditioning is {conditioning!r}; expected a name, a dict(type=...), or a list of these. {_known()}"
    )


def split_names(text: str) -> list[str]:
    """Split a list such as 'none,sc(strength=3.0,relative=True)' at its commas, but not at those of settings."""
    names, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names]


def _read(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings in a text such as 'sc(strength=3.0, relative=True)+pc'."""
    try:
        node, terms = ast.parse(text.strip(), mode="eval").body, list[ast.expr]()
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            terms.insert(0, node.right)
            node = node.left
        return [_read_term(term) for term in [node, *terms]]
    except (SyntaxError, ValueError) as error:
        message = f"cannot read the conditioning {text!r}; expected a text such as 'sc(strength=3.0)+pc'. {_known()}"
        raise ValueError(message) from error


def _read_term(node: ast.expr) -> tuple[str, dict[str, Any]]:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    settings = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    if not isinstance(call.func, ast.Name) or call.args or len(settings) < len(call.keywords):
        raise ValueError("expected a name, or a name with settings")
    return call.func.id, {name: ast.literal_eval(value) for name, value in settings.items()}


def _instance(name: Any, settings: dict[str, Any]) -> Method:
    """The method called ``name``; a short name stands for settings of its own."""
    full = _ALIASES.get(name, name)
    if full not in _METHODS:
        raise ValueError(f"unknown conditioning {name!r}. {_known()}")
    cls = _METHODS[full]
    try:
        return cls(**({**cls.alias_settings, **settings} if name in _ALIASES else settings))
    except TypeError as error:
        fields = ", ".join(field.name for field in dataclasses.fields(cls))
        raise ValueError(f"{cls.__name__}: {error}; its settings are {fields}") from None


def _known() -> str:
    names = ", ".join(f"'{alias}' ({name})" for alias, name in _ALIASES.items())
    return f"Known: {names}, several of them joined by '+', and 'none' by itself"
