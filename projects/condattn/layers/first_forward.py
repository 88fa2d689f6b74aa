"""Check in the first forward of a conditioned site that it calls the modules that its rule names."""

from __future__ import annotations

from functools import partial
from threading import get_ident
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..attention.adapters import inner
from ..attention.site import AttentionSite
from ..kernels.private import forward_hooks, forward_pre_hooks
from ..kernels.switch import is_compiling
from .hooks import PickledHook, remove_methods


class FirstForward(PickledHook):
    """Forward hooks of a conditioned site, which check that its first forward calls every module that its rule names.

    Modules that the rule gives a reader need not be called. A site that does not run, whose forward fails, or that is
    compiled or exported is not checked. The hooks remove themselves when the check has passed.

    Args:
        site: The site. A new object replaces an earlier one of the same module.
    """

    def __init__(self, site: AttentionSite) -> None:
        self.site = str(site)
        module: Any = site.module
        parts = [part for part in (site.q, site.k, site.v, site.out) if part is not None and part.reader is None]
        owners = {inner(part.owner) for part in parts} - {module}
        # Where adapters wrap a layer, the path of the outermost one is used.
        paths = {inner(one): path for path, one in reversed(list(module.named_modules())) if inner(one) in owners}
        self.paths = tuple(reversed(paths.values()))
        self.uncalled: set[str] = set()
        self.thread = 0
        self.handles: list[RemovableHandle] = []
        self.forget(module)
        if self.paths:
            module.first_forward = self
            self.keep(
                module.register_forward_pre_hook(self.begin), module.register_forward_hook(self.end, always_call=True)
            )

    def begin(self, module: nn.Module, args: tuple) -> None:
        """Register hooks on the named modules; a forward pre-hook of the site."""
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
        """Remove the hooks of the named modules, and check that all were called; a forward hook of the site.

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
                f"{self.site} did not call {names} in its forward, so that its conditioning has no effect there; its "
                "rule must name the modules that are called, or, of those whose weights the forward uses itself, the "
                "reader: **read_by(m, thirds(m.qkv)), out=into(m.proj, reader=m)"
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
