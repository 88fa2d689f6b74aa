"""Check in the first forward of what is conditioned that it calls the modules that its rule names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import get_ident
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..attention.adapters import inner
from ..attention.site import AttentionSite
from ..attention.tokens import TokenEntry
from ..kernels.private import forward_hooks, forward_pre_hooks
from ..kernels.switch import is_compiling
from .hooks import PickledHook, remove_methods


class FirstForward(PickledHook):
    """Forward hooks of a module, which check that its first forward calls other modules in it.

    A module that does not run, whose forward fails, or that is compiled or exported is not checked. The hooks remove
    themselves when the check has passed.

    Args:
        module: The module. A new object replaces an earlier one of the same module.
        paths: Names in ``module`` of those that it has to call.
        name: The module, for the message.
        advice: What to do if it does not call them, the end of the message.
    """

    def __init__(self, module: nn.Module, paths: Sequence[str], name: str, advice: str) -> None:
        self.paths, self.name, self.advice = tuple(paths), name, advice
        self.uncalled: set[str] = set()
        self.thread = 0
        self.handles: list[RemovableHandle] = []
        self.forget(module)
        if self.paths:
            module.first_forward = self  # type: ignore[assignment]
            self.keep(
                module.register_forward_pre_hook(self.begin), module.register_forward_hook(self.end, always_call=True)
            )

    @classmethod
    def of_site(cls, site: AttentionSite) -> FirstForward:
        """Check that a site calls its projections, except those that its rule gives a reader."""
        module: Any = site.module
        parts = [part for part in (site.q, site.k, site.v, site.out) if part is not None and part.reader is None]
        owners = {inner(part.owner) for part in parts} - {module}
        # Where adapters wrap a layer, the path of the outermost one is used.
        paths = {inner(one): path for path, one in reversed(list(module.named_modules())) if inner(one) in owners}
        advice = (
            "its rule must name the modules that are called, or, of those whose weights the forward uses itself, the "
            "reader: **read_by(m, thirds(m.qkv)), out=into(m.proj, reader=m)"
        )
        return cls(module, tuple(reversed(paths.values())), str(site), advice)

    @classmethod
    def of_tokens(cls, model: nn.Module, entry: TokenEntry) -> FirstForward:
        """Check that the module in ``model`` whose embedded tokens are conditioned calls its first block."""
        module = model.get_submodule(entry.model)
        paths = [path for path, one in module.named_modules() if one is entry.module and path]
        name = f"{entry.model or 'the model'} ({type(module).__name__})"
        advice = "the rule for its tokens must name a module that is called, and not one whose forward is"
        return cls(module, paths, name, advice)

    def begin(self, module: nn.Module, args: tuple) -> None:
        """Register hooks on the named modules; a forward pre-hook of the module."""
        if is_compiling() or getattr(module, "_is_replica", False) or self.handles:
            return
        self.thread = get_ident()
        self.uncalled = set(self.paths)
        self.handles = [
            module.get_submodule(path).register_forward_pre_hook(partial(self.note, path)) for path in self.paths
        ]

    def note(self, path: str, module: nn.Module, args: tuple) -> None:
        """Record that a named module was called; a forward pre-hook of the module."""
        self.uncalled.discard(path)

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Remove the hooks of the named modules, and check that all were called; a forward hook of the module.

        Raises:
            RuntimeError: If a module was not called.
        """
        if not self.handles or self.thread != get_ident():  # only the thread that began the check ends it
            return
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if output is None:  # the forward failed
            return
        if self.uncalled:
            names = ", ".join(path for path in self.paths if path in self.uncalled)
            raise RuntimeError(
                f"{self.name} did not call {names} in its forward, so that its conditioning has no effect there; "
                f"{self.advice}"
            )
        self.forget(module)

    @classmethod
    def forget(cls, module: nn.Module) -> None:
        """Remove the hooks of this class from ``module``."""
        if module.__dict__.pop("first_forward", None) is not None:
            remove_methods(module, cls)


def count_hooks(module: nn.Module) -> int:
    """Count the forward hooks and pre-hooks of ``module``, except those of :class:`FirstForward`."""
    own = 2 * ("first_forward" in module.__dict__)
    return len(forward_hooks(module)) + len(forward_pre_hooks(module)) - own
