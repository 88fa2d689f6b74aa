"""Whether the modules that a rule names are those that a site computes with, as its first forward shows."""

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
from .hooks import remove_methods


class FirstForward:
    """Forward hooks of a conditioned site until its first forward, which must call every module that its rule names.

    What a forward uses without calling it counts where the rule says so. A site that does not run, or whose forward
    fails, is not judged; nor is one that is compiled or exported.

    Args:
        site: The site; of two objects for one module the last counts.
    """

    def __init__(self, site: AttentionSite) -> None:
        self.site = str(site)
        module: Any = site.module
        parts = [part for part in (site.q, site.k, site.v, site.out) if part is not None and part.reader is None]
        owners = {inner(part.owner) for part in parts} - {module}
        # The adapters around a layer come first.
        paths = {inner(one): path for path, one in reversed(list(module.named_modules())) if inner(one) in owners}
        self.paths = tuple(reversed(paths.values()))
        self.uncalled: set[str] = set()
        self.thread = 0
        self.handles: list[RemovableHandle] = []
        self.forget(module)
        if self.paths:
            module.first_forward = self
            module.register_forward_pre_hook(self.begin)
            module.register_forward_hook(self.end, always_call=True)

    def begin(self, module: nn.Module, args: tuple) -> None:
        """Watch the modules that are named."""
        if is_compiling() or getattr(module, "_is_replica", False) or self.handles:
            return
        self.thread = get_ident()
        self.uncalled = set(self.paths)
        self.handles = [
            module.get_submodule(path).register_forward_pre_hook(partial(self.note, path)) for path in self.paths
        ]

    def note(self, path: str, module: nn.Module, args: tuple) -> None:
        """A module that is named was called."""
        self.uncalled.discard(path)

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Judge, and go.

        Raises:
            RuntimeError: If a module was not called.
        """
        if not self.handles or self.thread != get_ident():  # of several threads the first judges
            return
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if output is None:  # it failed
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
        """Take the hooks from ``module``."""
        if module.__dict__.pop("first_forward", None) is not None:
            remove_methods(module, cls)


def count_hooks(module: nn.Module) -> int:
    """The number of forward hooks and pre-hooks of ``module`` that are not those of its first forward."""
    own = 2 * ("first_forward" in module.__dict__)
    return len(forward_hooks(module)) + len(forward_pre_hooks(module)) - own
