"""The Jacobian of a head's output with respect to its W_Q, W_K or W_V.

The Jacobian of an N x d output with respect to a D x d weight is (N d) x (D d). For plain softmax attention, its rows
are Kronecker products (kronecker.py), whatever bias and mask are added to the logits. One forward-mode derivative of
the host's own forward tells whether a head computes plain softmax attention. If it does not, the Jacobian is computed
only from forward-mode and reverse-mode derivatives of the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention.site import AttentionSite, as_matrix, indices, is_transposed
from ..layers.class_swap import restore_class, swap_class
from ..layers.head_norm import HeadNorm
from ..layers.head_transform import head_transform_of
from ..layers.multihead import ConditionedMultiheadAttention
from .capture import Seen, doubled, doubled_state, head_outputs, noise, precondition, without_caches
from .extremes import Extremes, jacobian_extremes, kronecker_extremes
from .kronecker import RowKronecker, row_kronecker


@dataclass(frozen=True)
class Jacobian:
    """The Jacobian of the output of one head, with respect to one of its weights.

    Attributes:
        site: Name of the site.
        head: Number of the head.
        weight: 'W_Q', 'W_K' or 'W_V'.
        output: 'A(X)', or 'C A(X)'.
        extremes: Its extreme singular values.
        plain: Whether its derivative is that of plain softmax attention.
    """

    site: str
    head: int
    weight: str
    output: str
    extremes: Extremes
    plain: bool


def head_jacobians(
    site: AttentionSite, seen: Seen, head: int, sample: int = 0
) -> tuple[list[Jacobian], dict[str, Exception]]:
    """Compute the Jacobians of A(X), and if preconditioned of C A(X), of one head and image or window.

    Returns:
        The Jacobians; and a dictionary from the names of those that could not be computed, such as 'dA(X)/dW_Q', to the
        errors: a weight or the outputs of the site cannot be reached, attention is saturated, or the host cannot be
        differentiated in both modes.
    """
    found, failed = [], {}
    for name in ("q", "k", "v"):
        for conditioned in (False, True) if head_transform_of(site) else (False,):
            output, weight = "C A(X)" if conditioned else "A(X)", f"W_{name.upper()}"
            try:
                extremes, plain = _head_extremes(site, seen, name, head, sample, conditioned)
            except (ValueError, RuntimeError, IndexError) as error:
                failed[f"d{output}/d{weight}"] = error
            else:
                found.append(Jacobian(site.name, head, weight, output, extremes, plain))
    return found, failed


def _head_extremes(
    site: AttentionSite, seen: Seen, name: str, head: int, sample: int, conditioned: bool
) -> tuple[Extremes, bool]:
    """Return the extremes of one Jacobian, and whether it is that of plain softmax attention."""
    function = HeadFunction(site, seen.args, seen.kwargs, name, head, sample, conditioned)
    outputs = seen.outputs[sample, head]
    outputs = precondition(site, outputs[None, None])[0, 0] if conditioned else outputs
    structured = _structured(site, seen, function, outputs)
    if structured:
        return kronecker_extremes(structured, noise(seen)), True
    norm = head_transform_of(site)
    rows = conditioned and isinstance(norm, HeadNorm) and not norm.detach and not site.cross_covariance
    null = unchanging(seen.outputs[sample, head]) if rows else None
    return jacobian_extremes(function, function.block, null, tolerance=noise(seen)), False


@torch.no_grad()
def _structured(site: AttentionSite, seen: Seen, function: HeadFunction, outputs: Tensor) -> RowKronecker | None:
    """Return the structured Jacobian if a derivative of the host in a random direction agrees with it; else None.

    Raises:
        ValueError: If the function does not compute the head that was captured, because the host makes windows or joins
            heads inside; or if attention is so saturated that its derivative is only rounding error.
    """
    direction = torch.randn(function.block.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, wanted = jvp(function, (function.block,), (direction.to(function.block),))
    same = value.shape == outputs.shape and torch.allclose(value.double(), outputs.double(), rtol=1e-3, atol=1e-5)
    if not same:
        raise ValueError(f"{site}: the output of one head and window is not one part of what it returns")
    jacobian = row_kronecker(site, seen, function.name, function.head, function.sample, function.conditioned)
    if jacobian is None:
        return None
    direction = direction.to(wanted)
    found = jacobian(direction)
    if jacobian.is_rounding(direction, wanted):
        raise ValueError(f"{site}: attention is saturated; what is left of its derivative is rounding")
    scaling = (found * wanted).sum() / found.square().sum()
    tolerance = max(1e-6, 100 * torch.finfo(seen.map.dtype).eps)
    return jacobian.scaled(scaling) if (scaling * found - wanted).norm() <= tolerance * wanted.norm() else None


def unchanging(outputs: Tensor) -> Tensor:
    """Return the directions in which C A(X) cannot change, which are the lengths of its rows.

    They are orthonormal, (N, N d), for outputs (N, d).
    """
    rows = outputs.double()
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return torch.diag_embed(rows.T).movedim(0, -1).flatten(1)


class HeadFunction:
    """The output of one head of a site, as a function of its W_Q, W_K or W_V, in float64.

    Args:
        site: The site.
        args: Arguments of a call of its module.
        kwargs: Keyword arguments of the call.
        name: 'q', 'k' or 'v'.
        head: Number of the head.
        sample: Which image or window.
        conditioned: Whether the output is C A(X), with the site's preconditioner or the default one, instead of A(X).

    Raises:
        ValueError: If the site has no such weight of its own, or its outputs cannot be captured.
    """

    def __init__(
        self, site: AttentionSite, args: tuple, kwargs: dict, name: str, head: int, sample: int, conditioned: bool
    ) -> None:
        projection = getattr(site, name)
        if projection is None or site.out is None:
            raise ValueError(f"{site}: {site.obstacle}")
        names = {id(value): key for key, value in site.module.named_parameters()}
        self.state = doubled_state(site.module)
        self.weight = getattr(projection.owner, projection.parameter).detach().double()
        self.parameter = names.get(id(getattr(projection.owner, projection.parameter)))
        if self.parameter is None:
            raise ValueError(f"{site}: its W_{name.upper()} belongs to a module outside it")
        self.site, self.name, self.sample, self.conditioned = site, name, sample, conditioned
        self.args, self.kwargs = doubled(args), doubled(without_caches(kwargs))
        heads = site.heads_of(projection)
        rows = indices(projection.rows)
        size = len(rows) // heads
        self.head, group = head, head * heads // site.num_heads
        self.rows = torch.tensor(rows[group * size : (group + 1) * size], device=self.weight.device)
        self.owner = projection.owner

    @property
    def block(self) -> Tensor:
        """The weight of the head, (d, D), without correction."""
        return as_matrix(self.owner, self.weight)[self.rows]

    def __call__(self, block: Tensor) -> Tensor:
        """Return A(X) or C A(X), (N, d), for the head's weight ``block``, (d, D)."""
        matrix = as_matrix(self.owner, self.weight).index_copy(0, self.rows, block)
        weight = matrix.T if is_transposed(self.owner) else matrix.view_as(self.weight)
        seen: list[Tensor] = []
        with _record_head_outputs(self.site, seen), sdpa_kernel(SDPBackend.MATH):
            functional_call(self.site.module, {**self.state, self.parameter: weight}, self.args, self.kwargs)
        outputs = head_outputs(self.site, seen[-1])
        if self.conditioned:
            outputs = precondition(self.site, outputs)
        return outputs[self.sample, self.head]


@contextmanager
def _record_head_outputs(site: AttentionSite, seen: list[Tensor]) -> Iterator[None]:
    """Append the head outputs of each call to ``seen``, with their derivatives."""
    owner = site.out.owner
    if not isinstance(owner, nn.MultiheadAttention):
        hook = owner.register_forward_pre_hook(lambda module, args: seen.append(args[0]), prepend=True)
        try:
            yield
        finally:
            hook.remove()
        return
    plain = not isinstance(owner, ConditionedMultiheadAttention)
    before = owner.__dict__.get("head_transform")
    swap_class(owner, ConditionedMultiheadAttention)
    owner.head_transform = _Recorder(seen)
    try:
        yield
    finally:
        del owner.head_transform
        if before is not None:
            owner.head_transform = before
        if plain:
            restore_class(owner)


class _Recorder:
    """Replaces a head transform: records the head outputs, and leaves them unchanged."""

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.seen.append(x)
        return F.linear(x, weight, bias)
