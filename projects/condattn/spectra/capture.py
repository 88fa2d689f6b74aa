"""Capture what happens at each attention site while a model runs: the attention map, its logits, the head outputs.

The host's code does not have to cooperate. Fused kernels never expose the map, so scaled dot-product attention runs in
its plain form meanwhile. The map is captured where the tensor operations of a site compute a softmax, and multiply its
result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from ..attention.site import AttentionSite, is_convolution
from ..layers.head_norm import HeadNorm
from ..layers.head_transform import head_transform_of
from .weights import name_of

aten = torch.ops.aten
SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
LARGE = 2**24
"""A call is not recomputed in float64 if the maps of one sample have more entries than this."""
REFUSALS = (AssertionError, RuntimeError, TypeError, ValueError)
"""What modules raise that cannot compute in float64, or cannot be called twice."""
CACHES = ("past_key_values", "past_key_value", "layer_past")
COPIES = {aten._to_copy.default, aten.clone.default}
PRODUCTS = {aten.bmm.default, aten.mm.default}


@dataclass
class Seen:
    """Data captured from one call of an attention site.

    The data is recomputed in float64 from the inputs of the call, unless that is impossible.

    Attributes:
        logits: Input of the softmax, with bias and mask, (samples, heads, N, M); None if no softmax was captured whose
            result is multiplied by something. A sample is an image, or a window of one.
        map: Output of the softmax, the attention map, of the same shape.
        outputs: A(X), the outputs of the heads, (samples, heads, N, d), also of attention between channels, whose map
            is d x d; None if they could not be captured.
        sources: 'q', 'k', 'v' -> the tokens that the projection receives, (samples, N or M, D), if they could be
            captured.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.
        precision: Relative precision of the inputs of the call, whatever precision it is recomputed in.
        refusal: Why the call could not be recomputed in float64; '' if it was.
    """

    logits: Tensor | None
    map: Tensor | None
    outputs: Tensor | None
    sources: dict[str, Tensor]
    args: tuple
    kwargs: dict[str, Any]
    precision: float
    refusal: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The least precise dtype of logits, map and outputs, which limits the precision of all that follows."""
        found = [one.dtype for one in (self.logits, self.map, self.outputs) if one is not None]
        return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)

    @property
    def limit(self) -> str:
        """Which dtype limits the precision, and why; '' if it is float64."""
        if self.dtype == torch.float64:
            return ""
        return f"{name_of(self.dtype)}, because {self.refusal or 'the module itself converts its data'}"

    @property
    def tokens(self) -> Tensor | None:
        """X, (samples, N, D), of self-attention; None if queries and keys are made from different tokens."""
        queries = self.sources.get("q")
        return queries if queries is not None and queries is self.sources.get("k") else None


@contextmanager
def capture(sites: Iterable[AttentionSite], observe: Callable[[AttentionSite, Seen], None]) -> Iterator[None]:
    """Call ``observe`` with the data of each call of each site while the context is active.

    The model runs without gradients, and is left unchanged.
    """
    operations = _Operations()
    with ExitStack() as stack:
        for site in sites:
            for hook in operations.watch(site, observe):
                stack.callback(hook.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_slow_path())
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(operations)
        yield


@contextmanager
def _slow_path() -> Iterator[None]:
    """Disable PyTorch's fast path, which runs an encoder layer as one operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass
class _Call:
    """A call of a site that is running: its softmaxes, the products of their results, its inputs and head outputs."""

    site: AttentionSite
    args: tuple
    kwargs: dict[str, Any]
    precision: float
    maps: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    products: dict[int, Tensor] = field(default_factory=dict)
    passed: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def seen(self) -> Seen:
        """Return the captured data.

        It is that of the last softmax whose result was multiplied; or, if each head has its own softmax, of all of
        them.
        """
        heads = self.site.num_heads
        parts = [(*self.maps[i], self.products[i].reshape(*self.maps[i][1].shape[:-1], -1)) for i in self.products]
        logits, weights, outputs = None, None, None
        alone = len({tensor.shape for part in parts for tensor in part[:2]}) == 1 and parts[0][0].dim() == 3
        if len(parts) == heads > 1 and alone:
            logits, weights, outputs = (torch.stack(tensors, -3).flatten(0, -4) for tensors in zip(*parts, strict=True))
        elif parts:
            logits, weights, outputs = (_by_head(tensor, heads) for tensor in parts[-1])
        if outputs is not None and self.site.cross_covariance:
            outputs = outputs.mT
        if self.passed is not None and not (outputs is not None and self._matches_passed(outputs)):
            outputs = head_outputs(self.site, self.passed)
        return Seen(logits, weights, outputs, self._sources(weights, outputs), self.args, self.kwargs, self.precision)

    def _matches_passed(self, product: Tensor) -> bool:
        """Return whether a product is the tensor that left the heads, except for padding that was cut off.

        It is not if something was added in between.
        """
        channels = self.passed.shape[self.site.out.axis]
        if product.numel() == self.passed.numel():
            return torch.allclose(product.double().norm(), self.passed.double().norm(), rtol=1e-3)
        return product.shape[-1] * self.site.num_heads == channels

    def _sources(self, weights: Tensor | None, outputs: Tensor | None) -> dict[str, Tensor]:
        if outputs is None:
            return {}
        module = self.site.module
        read = {name for name in "qkv" if (part := getattr(self.site, name)) and part.reader is module}
        inputs = self.inputs | {name: next(iter((*self.args, *self.kwargs.values()))) for name in read}
        if isinstance(module, nn.MultiheadAttention):
            given = dict(zip(("query", "key", "value"), self.args, strict=False)) | self.kwargs
            inputs = {name[0]: given[name] for name in ("query", "key", "value")}
        counts = {"q": outputs.shape[2], "k": outputs.shape[2] if weights is None else weights.shape[-1]}
        arranged: dict[tuple[int, int], Tensor | None] = {}  # inputs that are one tensor stay one tensor
        sources = {}
        for name, x in inputs.items():
            key = id(x), counts.get(name, counts["k"])
            if key not in arranged:
                arranged[key] = self._arrange(name, x, len(outputs), key[1])
            if arranged[key] is not None:
                sources[name] = arranged[key]
        return sources

    def _arrange(self, name: str, x: Tensor, samples: int, count: int) -> Tensor | None:
        """Return the input of a projection as (samples, tokens, channels); None if the number of tokens differs."""
        if isinstance(self.site.module, nn.MultiheadAttention):
            x = x.transpose(0, 1) if x.dim() == 3 and not self.site.module.batch_first else x
        elif is_convolution(getattr(self.site, name).owner):
            x = x.flatten(2).mT
        return x.reshape(samples, count, -1) if x.numel() == samples * count * x.shape[-1] else None


class _Operations(TorchDispatchMode):
    """Records the tensor operations of the innermost site that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.paused, self.recomputing = False, False
        self.seen: Seen | None = None
        self.precision = 0.0

    def watch(self, site: AttentionSite, observe: Callable[[AttentionSite, Seen], None]) -> list[RemovableHandle]:
        """Register the hooks that begin and end the calls of a site, and return their handles."""

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self.paused:
                precision = self.precision if self.recomputing else precision_of((args, kwargs))
                self.calls.append(_Call(site, args, kwargs, precision))

        def end(module: nn.Module, args: tuple, output: object) -> None:
            if self.paused:
                return
            call = self.calls.pop()
            if self.recomputing:  # the repeated call in float64, whose data is used
                self.seen = call.seen()
                return
            seen = self._in_double(module, call)
            self.paused = True  # the observer may call the module again
            try:
                with _disable_current_modes():
                    observe(site, seen)
            finally:
                self.paused = False

        def leave(module: nn.Module, args: tuple) -> None:
            if self._is_running(site):
                self.calls[-1].passed = args[0]

        hooks = [
            site.module.register_forward_pre_hook(begin, with_kwargs=True),
            site.module.register_forward_hook(end),
        ]
        if site.out is not None and not isinstance(site.out.owner, nn.MultiheadAttention):
            hooks.append(site.out.owner.register_forward_pre_hook(leave, prepend=True))
        for name in ("q", "k", "v"):
            projection = getattr(site, name)
            if projection is not None and projection.owner is not site.module:

                def enter(module: nn.Module, args: tuple, name: str = name) -> None:
                    if self._is_running(site):
                        self.calls[-1].inputs[name] = args[0]

                hooks.append(projection.owner.register_forward_pre_hook(enter))
        return hooks

    def _in_double(self, module: nn.Module, call: _Call) -> Seen:
        """Repeat the call in float64, and return its data; if that is impossible, those of the call and the reason."""
        seen = call.seen()
        known = seen.map if seen.map is not None else seen.outputs
        samples = 1 if known is None else len(known)
        if sum(logits.numel() for logits, _ in call.maps) > LARGE * samples:
            return replace(seen, refusal=f"the maps of one sample have more than {LARGE:,} entries")
        self.recomputing, self.precision = True, call.precision
        depth = len(self.calls)
        try:
            functional_call(module, doubled_state(module), doubled(call.args), doubled(without_caches(call.kwargs)))
        except REFUSALS as error:
            del self.calls[depth:]
            reason = " ".join(str(error).split())[:160]
            return replace(seen, refusal=f"the module cannot be called in float64 ({type(error).__name__}: {reason})")
        finally:
            self.recomputing = False
        return self.seen

    def _is_running(self, site: AttentionSite) -> bool:
        return not self.paused and bool(self.calls) and self.calls[-1].site is site

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.calls:
            self._record(self.calls[-1], function, args, result)
        return result

    def _record(self, call: _Call, function, args: tuple, result) -> None:
        if function in SOFTMAX and args[1] in (-1, result.dim() - 1):
            call.maps.append((args[0], result))
        elif function in COPIES:
            for index, (logits, weights) in enumerate(call.maps):
                if _has_rows_of(args[0], weights) and args[0].shape == weights.shape:
                    call.maps[index] = (logits, result)
        elif function in PRODUCTS:
            for index, (_, weights) in enumerate(call.maps):
                if _has_rows_of(args[0], weights):
                    call.products[index] = result
                elif _has_rows_of(args[1].mT, weights):
                    call.products[index] = result.mT


def doubled(values: Any) -> Any:
    """Convert all floating-point tensors in ``values`` to float64; one tensor in several places stays one tensor."""
    done: dict[int, Tensor] = {}

    def double(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        return done.setdefault(id(value), value.double())

    return tree_map(double, values)


def precision_of(values: Any) -> float:
    """Return the precision of the first floating-point tensor, or that of float64 if there is none."""
    found = [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()]
    return torch.finfo(found[0].dtype if found else torch.float64).eps


def without_caches(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of transformers' attention without caches, so that the call can be repeated.

    Each call would append keys to such a cache.
    """
    return {name: None if name in CACHES else value for name, value in kwargs.items()}


def doubled_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module in float64."""
    return doubled({**dict(module.named_parameters()), **dict(module.named_buffers())})


def precondition(site: AttentionSite, outputs: Tensor) -> Tensor:
    """Return C A(X), (samples, heads, N, d), by the site's head transform, or the default norm if it has none."""
    transform = head_transform_of(site) or HeadNorm(site)
    return transform.transform_heads(outputs, outputs.dim() - 3, outputs.dim() - 1)


def noise(seen: Seen) -> float:
    """Return the tolerance for the rounding error of the inputs.

    Singular values below this multiple of the largest one count as zero.
    """
    return 8 * seen.precision


def _has_rows_of(one: Tensor, other: Tensor) -> bool:
    """Return whether the rows of two matrices are the same memory."""
    return _shares(one, other) and one.shape[-1] == other.shape[-1] and one.stride(-1) == other.stride(-1)


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def head_outputs(site: AttentionSite, passed: Tensor) -> Tensor:
    """Return the tensor that passes at ``site.out`` as head outputs, (samples, heads, N, d)."""
    if site.out.num_heads == 1 < site.num_heads:  # the heads have an axis of their own
        return _by_head(passed, site.num_heads)
    return HeadNorm(site).rows(passed)


def _by_head(tensor: Tensor, heads: int) -> Tensor | None:
    """Return a tensor (..., rows, columns) as (samples, heads, rows, columns); None if no axis is that of the heads."""
    if tensor.dim() == 3 and tensor.shape[0] % heads == 0:
        return tensor.unflatten(0, (-1, heads))
    if tensor.dim() < 4:
        return None
    axes = [axis for axis in dict.fromkeys((1, tensor.dim() - 3)) if tensor.shape[axis] == heads]
    if len(axes) == 2 and heads > 1:  # ambiguous: as many windows as heads
        return None
    if axes:
        return tensor.movedim(axes[0], -3).flatten(0, -4)
    if tensor.shape[1] % heads == 0:  # several maps for each head
        return tensor.movedim(1, -3).flatten(0, -4)
    if tensor.shape[0] % heads == 0:
        return tensor.unflatten(0, (-1, heads)).movedim(1, -3).flatten(0, -4)
    return None
