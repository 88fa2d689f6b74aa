"""Change the class of a module in place, keeping its parameters, buffers and hooks, and restore its original class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from ..attention.classes import qualified_name
from ..attention.site import AttentionSite
from ..kernels.private import override_parameter
from .turns import end_turn, take_turn

# Wrappers that behave differently from the class that they wrap only in torch before 1.5.
SAME = tuple(f"mmcv.cnn.bricks.wrappers.{name}" for name in ("Linear", "Conv2d", "Conv3d"))


def check_can_swap(owner: nn.Module, layer: type[ConditionedLayer], site: AttentionSite) -> None:
    """Raise a one-line ``ValueError`` unless ``owner`` can become a ``layer`` by :func:`swap_class`.

    It can if it is not parametrized, its forward is that of its class, and this class is the host class,
    ``layer.host``, one of ``SAME``, or a subclass that adds no methods and properties except ``__init__``.
    """
    if isinstance(owner, layer):
        return
    classes = type(owner).__mro__
    own = classes[: classes.index(layer.host)] if layer.host in classes else classes
    added = [cls for cls in own if qualified_name(cls) not in SAME]
    if has_own_forward(owner):
        problem = f"{type(owner).__name__}, whose forward was replaced (by accelerate, for instance)"
    elif nn.utils.parametrize.is_parametrized(owner):
        problem = f"parametrized {layer.host.__name__}"
    elif any(_is_behaviour(member) and name != "__init__" for cls in added for name, member in vars(cls).items()):
        problem = f"{type(owner).__name__}, which has methods or properties that {layer.host.__name__} has not"
    else:
        return
    raise ValueError(f"{site}: cannot condition its {problem}; {leave_out(site)}")


def _is_behaviour(member: object) -> bool:
    return callable(member) or isinstance(member, property | classmethod | staticmethod)


def has_own_forward(owner: nn.Module) -> bool:
    """Return whether ``owner`` has a forward of its own, other than that of its class.

    accelerate gives one to layers whose weights it moves between devices; where it removes it, it leaves that of the
    class.
    """
    own = vars(owner).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(owner).forward


def check_can_restore(modules: Iterable[nn.Module]) -> None:
    """Raise a one-line ``ValueError`` unless :func:`restore_class` can undo all changes of classes of ``modules``."""
    for module in modules:
        if not isinstance(module, ConditionedLayer):
            continue
        if nn.utils.parametrize.is_parametrized(module):
            advice = "is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
        elif has_own_forward(module):
            advice = "has a forward of accelerate's; call accelerate.hooks.remove_hook_from_submodules(model) first"
        else:
            continue
        raise ValueError(f"a {type(module).__name__} cannot become a plain layer again, because it {advice}")


def leave_out(site: AttentionSite) -> str:
    """Return the advice that ends an error message about a ``site`` that cannot be conditioned."""
    if not site.name:
        return "this module is the only site, so that the method cannot be used here"
    return f"leave the site out with exclude=[{site.name!r}]"


class ConditionedLayer:
    """Mixin for the classes that :func:`swap_class` gives to layers; ``host`` is the class that they extend."""

    host: ClassVar[type[nn.Module]]
    overridden: Mapping[str, Any] | None = None
    """The parameters that others replace at the moment, see :class:`.overrides.ParameterOverride`."""

    def __new__(cls, *args, **kwargs) -> Any:
        """Build a plain host layer if there are arguments, as PEFT's adapters need; copying passes no arguments."""
        return cls.host(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __prepare_scriptable__(self) -> None:
        refuse_scripting()

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        with self._restored():
            super()._save_to_state_dict(*args, **kwargs)  # type: ignore[misc]  # of nn.Module

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        with self._restored():
            super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, *args, **kwargs) -> Any:
        with self._restored():
            return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        with self._restored():
            return super().__getstate__()  # type: ignore[misc]

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Put parameters back that a forward replaced which was interrupted, and let no other thread replace them."""
        take_turn(self, self)
        try:
            restore_parameters(self)
            yield
        finally:
            end_turn(self, self)


def restore_parameters(owner: Any) -> None:
    """Put the parameters back that were replaced for a forward."""
    if overridden := getattr(owner, "overridden", None):
        for name, parameter in overridden.items():
            override_parameter(owner, name, parameter)
        owner.overridden = None


def refuse_scripting() -> None:
    """Raise an error; ``torch.jit.script`` calls this for a conditioned module.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        "torch.jit.script cannot compile conditioned attention; use torch.jit.trace, torch.export or torch.compile, or "
        "condattn.fold(model) before, which leaves plain layers where weights are all that is conditioned"
    )


def swap_class(owner: Any, layer: type[ConditionedLayer]) -> Any:
    """Turn ``owner`` in place into an instance of ``layer``, a subclass of its class, and return it.

    The object keeps its identity: parameters, buffers, hooks, optimizer groups and references to it all remain.
    """
    if not isinstance(owner, layer):
        owner.host_class = type(owner)
        owner.__class__ = layer
        owner.__dict__.pop("forward", None)  # see has_own_forward
    return owner


def restore_class(owner: nn.Module) -> None:
    """Undo :func:`swap_class`."""
    owner.__class__ = owner.__dict__.pop("host_class")
    owner.__dict__.pop("forward", None)
