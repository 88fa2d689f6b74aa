"""What happens at each attention site while a model runs: the attention map, its logits, the head outputs.

Nothing is asked of the host's code. Fused kernels never show the map, so scaled dot-product attention runs in its plain
form meanwhile, and the map is seen where the tensor operations of a site compute a softmax and multiply its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from ..attention.site import AttentionSite
from ..layers.head_norm import HeadNorm
from ..layers.head_transform import head_transform_of

aten = torch.ops.aten
SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
LARGE = 2**24
"""A call whose maps have more entries is not computed again in float64."""
CACHES = ("past_key_values", "past_key_value", "layer_past")
COPIES = {aten._to_copy.default, aten.clone.default}
PRODUCTS = {aten.bmm.default, aten.mm.default}


@dataclass
class Seen:
    """What one call of an attention site showed, computed in float64 from what went in where its module can do that.

    Attributes:
        logits: Input of the softmax, bias and mask included, (samples, heads, N, M); None where no softmax was seen
            whose result is multiplied with something. A sample is an image, or a window of one.
        map: Its output, the attention map, of the same shape.
        outputs: A(X), the outputs of the heads, (samples, heads, N, d), also of attention between channels, whose map
            is d x d; None where they could not be seen.
        sources: 'q', 'k', 'v' -> the tokens that the projection gets, (samples, N or M, D), where they could be seen.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.
        precision: Relative precision of what went in, whatever it is computed in.
    """

    logits: Tensor | None
    map: Tensor | None
    outputs: Tensor | None
    sources: dict[str, Tensor]
    args: tuple
    kwargs: dict[str, Any]
    precision: float

    @property
    def tokens(self) -> Tensor | None:
        """X, (samples, N, D), of self-attention; None where queries and keys are made of different tokens."""
        queries = self.sources.get("q")
        return queries if queries is not None and queries is self.sources.get("k") else None


@contextmanager
def capture(sites: Iterable[AttentionSite], observe: Callable[[AttentionSite, Seen], None]) -> Iterator[None]:
    """While the context lasts, show ``observe`` what each call of each site does.

    Runs without gradients; the model is left as it is.
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
    """PyTorch's encoder layers as they are written, not as one operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass
class _Call:
    """A running call: its softmaxes, the products of their results with something, and what went in and out."""

    site: AttentionSite
    args: tuple
    kwargs: dict[str, Any]
    precision: float
    maps: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    products: dict[int, Tensor] = field(default_factory=dict)
    passed: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def seen(self) -> Seen:
        """What it showed: the last softmax whose result was multiplied, or those of the heads, one after the other."""
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
        if self.passed is not None and not (outputs is not None and self._leads_to_what_passed(outputs)):
            outputs = head_outputs(self.site, self.passed)
        return Seen(logits, weights, outputs, self._sources(weights, outputs), self.args, self.kwargs, self.precision)

    def _leads_to_what_passed(self, product: Tensor) -> bool:
        """Whether a product is what left the heads, but for padding that was cut off; not if something was added."""
        channels = self.passed.shape[self.site.out.axis]
        if product.numel() == self.passed.numel():
            return torch.allclose(product.norm(), self.passed.norm(), rtol=1e-3)
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
        arranged: dict[tuple[int, int], Tensor | None] = {}  # what was one tensor stays one
        sources = {}
        for name, x in inputs.items():
            key = id(x), counts.get(name, counts["k"])
            if key not in arranged:
                arranged[key] = self._arrange(name, x, len(outputs), key[1])
            if arranged[key] is not None:
                sources[name] = arranged[key]
        return sources

    def _arrange(self, name: str, x: Tensor, samples: int, count: int) -> Tensor | None:
        """The input of a projection as (samples, tokens, channels); None if it has other tokens than these."""
        if isinstance(self.site.module, nn.MultiheadAttention):
            x = x.transpose(0, 1) if x.dim() == 3 and not self.site.module.batch_first else x
        elif isinstance(getattr(self.site, name).owner, nn.Conv2d):
            x = x.flatten(2).mT
        return x.reshape(samples, count, -1) if x.numel() == samples * count * x.shape[-1] else None


class _Operations(TorchDispatchMode):
    """Watches the tensor operations of the innermost site that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.asleep, self.again = False, False
        self.seen: Seen | None = None
        self.precision = 0.0

    def watch(self, site: AttentionSite, observe: Callable[[AttentionSite, Seen], None]) -> list[RemovableHandle]:
        """Hooks that begin and end the calls of a site."""

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self.asleep:
                precision = self.precision if self.again else precision_of((args, kwargs))
                self.calls.append(_Call(site, args, kwargs, precision))

        def end(module: nn.Module, args: tuple, output: object) -> None:
            if self.asleep:
                return
            call = self.calls.pop()
            if self.again:  # the same call in float64, which is the one to show
                self.seen = call.seen()
                return
            seen = self._in_double(module, call) or call.seen()
            self.asleep = True  # the observer may call the module again
            try:
                with _disable_current_modes():
                    observe(site, seen)
            finally:
                self.asleep = False

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

    def _in_double(self, module: nn.Module, call: _Call) -> Seen | None:
        """The call in float64; None where the maps are large, or the module has weights of others or casts itself."""
        if sum(logits.numel() for logits, _ in call.maps) > LARGE:
            return None
        self.again, self.seen, self.precision = True, None, call.precision
        depth = len(self.calls)
        try:
            functional_call(module, doubled_state(module), doubled(call.args), doubled(without_caches(call.kwargs)))
        except RuntimeError:
            del self.calls[depth:]
        finally:
            self.again = False
        return self.seen

    def _is_running(self, site: AttentionSite) -> bool:
        return not self.asleep and bool(self.calls) and self.calls[-1].site is site

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.calls:
            self._look(self.calls[-1], function, args, result)
        return result

    def _look(self, call: _Call, function, args: tuple, result) -> None:
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
    """The same with tensors of floating-point numbers in float64; what was one tensor is one."""
    done: dict[int, Tensor] = {}

    def double(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        return done.setdefault(id(value), value.double())

    return tree_map(double, values)


def precision_of(values: Any) -> float:
    """The precision of the first tensor of floating-point numbers."""
    found = [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()]
    return torch.finfo(found[0].dtype if found else torch.float64).eps


def without_caches(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of transformers' attention for a call of its own: it appends to a cache of keys each time."""
    return {name: None if name in CACHES else value for name, value in kwargs.items()}


def doubled_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, in float64."""
    return doubled({**dict(module.named_parameters()), **dict(module.named_buffers())})


def precondition(site: AttentionSite, outputs: Tensor) -> Tensor:
    """C A(X), by what transforms the site's head outputs, or the default norm: (samples, heads, N, d)."""
    transform = head_transform_of(site) or HeadNorm(site)
    return transform.transform_heads(outputs, outputs.dim() - 3, outputs.dim() - 1)


def noise(seen: Seen) -> float:
    """What counts as zero, relative to the largest singular value, for the rounding of what went in."""
    return 8 * seen.precision


def _has_rows_of(one: Tensor, other: Tensor) -> bool:
    """Whether the rows of a matrix are those of another in memory."""
    return _shares(one, other) and one.shape[-1] == other.shape[-1] and one.stride(-1) == other.stride(-1)


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def head_outputs(site: AttentionSite, passed: Tensor) -> Tensor:
    """What passes where ``site.out`` says, as head outputs (samples, heads, N, d)."""
    if site.out.num_heads == 1 < site.num_heads:  # the heads have an axis of their own
        return _by_head(passed, site.num_heads)
    return HeadNorm(site).rows(passed)


def _by_head(tensor: Tensor, heads: int) -> Tensor | None:
    """A tensor (..., rows, columns) as (samples, heads, rows, columns), or None where no axis is that of the heads."""
    if tensor.dim() == 3 and tensor.shape[0] % heads == 0:
        return tensor.unflatten(0, (-1, heads))
    if tensor.dim() < 4:
        return None
    axes = [axis for axis in dict.fromkeys((1, tensor.dim() - 3)) if tensor.shape[axis] == heads]
    if len(axes) == 2 and heads > 1:  # as many heads as windows
        return None
    if axes:
        return tensor.movedim(axes[0], -3).flatten(0, -4)
    if tensor.shape[1] % heads == 0:  # several maps a head
        return tensor.movedim(1, -3).flatten(0, -4)
    if tensor.shape[0] % heads == 0:
        return tensor.unflatten(0, (-1, heads)).movedim(1, -3).flatten(0, -4)
    return None
