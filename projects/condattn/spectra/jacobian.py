"""The Jacobian of a head's output with respect to its W_Q, W_K or W_V, and the bound of its condition number.

The Jacobian of an N x d output with respect to a D x d weight is (N d) x (D d). Where it is small it is computed whole,
and its singular values are exact. Elsewhere it is never built: products with it and with its transpose are forward-
and reverse-mode derivatives of the host's own forward, and a Lanczos method finds its extreme singular values.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..methods.base import become, restore
from ..methods.multihead import ConditionedMultiheadAttention
from ..methods.preconditioner import RowPreconditioner
from ..sites import AttentionSite, as_matrix, indices, is_transposed
from .capture import Seen, doubled, doubled_state, head_outputs, precondition, without_caches
from .weights import effective_heads

WHOLE = 2048
"""A Jacobian with no more rows, or no more columns, is computed whole."""
RELIABLE = 0.1
"""Up to this residual an extreme singular value counts as found."""
STEPS = 500
"""Of the method that finds the smallest singular value of others."""


@dataclass(frozen=True)
class Extremes:
    """The extreme singular values of a Jacobian.

    Attributes:
        sigma_max: The largest.
        sigma_min: The smallest that is not zero.
        rank: How many are not zero, or None where the Jacobian was not computed whole.
        size: Its rows and columns.
        residual: 0 where it was computed whole; else the larger of |G v - sigma^2 v| / sigma^2 of the two, with G the
            smaller of J J^T and J^T J: some sigma^2 lies so close, relatively. Above ``RELIABLE`` it was not found.
    """

    sigma_max: float
    sigma_min: float
    rank: int | None
    size: tuple[int, int]
    residual: float

    @property
    def kappa(self) -> float:
        """sigma_max / sigma_min; NaN where sigma_min was not found, or is of a matrix of zeros."""
        found = self.sigma_min and self.residual <= RELIABLE
        return self.sigma_max / self.sigma_min if found else float("nan")


@dataclass(frozen=True)
class Bound:
    """The bound of the condition number of a head's Jacobian, by Thm 3.4 of arXiv 2603.07162, and its factors.

    It bounds where no factor is singular. Here each condition number, as of all singular matrices, is that of the
    singular values that are not zero, with which products may have larger ones: it is the theorem's expression then,
    and no guarantee. Biases and what is added to the logits are not in it.

    kappa(X)^3 kappa(Lambda) kappa(W_V) (kappa(W_Q) + kappa(W_K)) + kappa(X) kappa(map), where Lambda is the derivative
    of the softmax: Diag(p) - p p^T for each row p of the map. That is always singular; like all others, its condition
    number is that of its singular values that are not zero.
    """

    tokens: float
    softmax_derivative: float
    map: float
    w_q: float
    w_k: float
    w_v: float

    @property
    def value(self) -> float:
        """The bound."""
        weights = self.w_v * (self.w_q + self.w_k)
        return self.tokens**3 * self.softmax_derivative * weights + self.tokens * self.map


@dataclass(frozen=True)
class Jacobian:
    """The Jacobian of the output of one head, with respect to one of its weights.

    Attributes:
        site: Name of the site.
        head: Number of the head.
        weight: 'W_Q', 'W_K' or 'W_V'.
        output: 'A(X)', or 'C A(X)'.
        extremes: Its extreme singular values.
    """

    site: str
    head: int
    weight: str
    output: str
    extremes: Extremes


def head_jacobians(site: AttentionSite, seen: Seen, head: int, sample: int = 0) -> list[Jacobian]:
    """The Jacobians of A(X), and of C A(X) where the site is preconditioned, of one head and image or window.

    Raises:
        ValueError: If a weight or the outputs of the site cannot be reached.
    """
    found = []
    conditioned = [False, True] if RowPreconditioner.applied_to(site) else [False]
    for name in ("q", "k", "v"):
        for precondition_ in conditioned:
            function = HeadFunction(site, seen.args, seen.kwargs, name, head, sample, precondition_)
            if not precondition_:
                _check_head(site, function, seen.outputs[sample, head])
            method = RowPreconditioner.applied_to(site)
            rows = precondition_ and not method.detach and not site.cross_covariance
            null = unchanging(seen.outputs[sample, head]) if rows else None
            extremes = jacobian_extremes(function, function.block, null, tolerance=noise(seen))
            output = "C A(X)" if precondition_ else "A(X)"
            found.append(Jacobian(site.name, head, f"W_{name.upper()}", output, extremes))
    return found


def _check_head(site: AttentionSite, function: HeadFunction, outputs: Tensor) -> None:
    """Raise unless the function is the head that was seen; some hosts make windows, or join heads, on the way."""
    value = function(function.block)
    if value.shape != outputs.shape or not torch.allclose(value.double(), outputs.double(), rtol=1e-3, atol=1e-5):
        raise ValueError(f"{site}: the output of one head and window is not one part of what it returns")


def head_bound(site: AttentionSite, seen: Seen, head: int, sample: int = 0) -> Bound:
    """The bound of Thm 3.4 for one head and image or window.

    Raises:
        ValueError: If the site is no self-attention between tokens whose tokens, map and weights are known.
    """
    refusal = ValueError(
        f"{site}: Thm 3.4 is of heads that are softmax(X W_Q W_K^T X^T) X W_V, of tokens X that are seen"
    )
    if site.cross_covariance or seen.tokens is None or seen.map is None or not (site.q and site.k and site.v):
        raise refusal
    heads = {name: effective_heads(site, name) for name in ("q", "k", "v")}
    weights = {name: matrix[head * len(matrix) // site.num_heads] for name, matrix in heads.items()}
    values = seen.tokens[sample] @ weights["v"].to(seen.tokens.dtype).T
    offset = seen.outputs[sample, head] - seen.map[sample, head] @ values  # of rows that sum to one: the bias
    if not torch.allclose(offset, offset[:1].expand_as(offset), atol=1e-3 * seen.outputs[sample, head].abs().max()):
        raise refusal
    rows = seen.map[sample, head].double()
    derivatives = [torch.diag_embed(part) - part[:, :, None] * part[:, None, :] for part in rows.split(32)]
    return Bound(
        _kappa(seen.tokens[sample], tolerance=noise(seen)),
        _kappa(*derivatives),
        _kappa(seen.map[sample, head]),
        *(_kappa(weights[name]) for name in ("q", "k", "v")),
    )


def noise(seen: Seen) -> float:
    """What counts as zero, relative to the largest singular value, for the rounding of what went in."""
    return 8 * seen.precision


def _kappa(*matrices: Tensor, tolerance: float = 0.0) -> float:
    """Of a matrix, or a block-diagonal matrix of these blocks."""
    values = torch.cat([torch.linalg.svdvals(part.double()).flatten() for part in matrices])
    top = values.max()
    values = values[values > max(tolerance, max(matrices[0].shape[-2:]) * torch.finfo(torch.float64).eps) * top]
    return (top / values.min()).item() if len(values) else math.nan


def unchanging(outputs: Tensor) -> Tensor:
    """Directions in which C A(X) cannot change, the lengths of its rows: orthonormal (N, N d), of outputs (N, d)."""
    rows = outputs.double()
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return torch.diag_embed(rows.T).movedim(0, -1).flatten(1)


@torch.no_grad()
def jacobian_extremes(
    function: Callable[[Tensor], Tensor],
    weight: Tensor,
    null: Tensor | None = None,
    whole: int = WHOLE,
    tolerance: float = 0.0,
) -> Extremes:
    """Extreme singular values of the Jacobian of ``function`` at ``weight``, in the precision of ``weight``.

    Args:
        function: Differentiable in both modes; any shape to any shape.
        weight: Where.
        null: Orthonormal directions (n, rows) of the output in which it cannot change, where they are known.
        whole: See ``WHOLE``.
        tolerance: What counts as zero, relative to the largest singular value, if that is more than rounding.

    Raises:
        ValueError: If the Jacobian has values that are not finite.
    """
    output, pull = vjp(function, weight)
    rows, columns = output.numel(), weight.numel()

    def forward(direction: Tensor) -> Tensor:
        return jvp(function, (weight,), (direction.reshape(weight.shape),))[1].flatten()

    def backward(direction: Tensor) -> Tensor:
        return pull(direction.reshape(output.shape))[0].flatten()

    if min(rows, columns) > whole:
        return _lanczos(forward, backward, rows, columns, null, weight)
    product, size = (backward, rows) if rows <= columns else (forward, columns)
    matrix = vmap(product, chunk_size=64)(torch.eye(size, dtype=weight.dtype, device=weight.device))
    if not matrix.isfinite().all():
        raise ValueError("the Jacobian has values that are not finite; is the checkpoint whole?")
    values = torch.linalg.svdvals(matrix.double())
    tolerance = max(tolerance, max(rows, columns) * torch.finfo(weight.dtype).eps)
    rank = int((values > tolerance * values[0]).sum())
    return Extremes(values[0].item(), values[max(rank - 1, 0)].item(), rank, (rows, columns), 0.0)


def _lanczos(
    forward: Callable, backward: Callable, rows: int, columns: int, null: Tensor | None, like: Tensor
) -> Extremes:
    """By products alone, with J J^T or J^T J, whichever is smaller."""
    from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg

    first, second = (backward, forward) if rows <= columns else (forward, backward)
    size = min(rows, columns)

    def gram(vector: np.ndarray) -> np.ndarray:
        direction = torch.as_tensor(vector, dtype=like.dtype, device=like.device).flatten()
        return second(first(direction)).double().cpu().numpy()

    generator = np.random.default_rng(0)
    largest, vector = eigsh(
        LinearOperator((size, size), gram, dtype=np.float64),
        1,
        which="LA",
        tol=1e-6,
        v0=generator.standard_normal(size),
    )
    top = largest[0]
    residual = float(np.linalg.norm(gram(vector[:, 0]) - top * vector[:, 0]) / top)
    constraints = null.double().cpu().numpy().T if null is not None and rows <= columns else None
    start = generator.standard_normal((size, 4))
    block = LinearOperator(
        (size, size), gram, matmat=lambda many: np.stack([gram(one) for one in many.T], 1), dtype=np.float64
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it has not converged: the residual says how far
        values, vectors = lobpcg(block, start, Y=constraints, largest=False, tol=1e-8 * top, maxiter=STEPS)
    zero = max(rows, columns) * np.finfo(np.float64).eps * top
    index = next((i for i in np.argsort(values) if values[i] > zero), None)
    if index is None:
        return Extremes(math.sqrt(top), math.nan, None, (rows, columns), residual)
    low = vectors[:, index]
    residual = max(residual, float(np.linalg.norm(gram(low) - values[index] * low) / values[index]))
    return Extremes(math.sqrt(top), math.sqrt(values[index]), None, (rows, columns), residual)


class HeadFunction:
    """The output of one head of a site, as a function of its W_Q, W_K or W_V, in float64.

    Args:
        site: The site.
        args: Arguments of a call of its module.
        kwargs: Keyword arguments of the call.
        name: 'q', 'k' or 'v'.
        head: Number of the head.
        sample: Which image or window.
        conditioned: Whether the output is C A(X), with the site's preconditioner or the default one, and not A(X).

    Raises:
        ValueError: If the site has no such weight of its own, or its outputs cannot be seen.
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
        self.site, self.sample, self.conditioned = site, sample, conditioned
        self.args, self.kwargs = doubled(args), doubled(without_caches(kwargs))
        heads = projection.num_heads or site.num_heads
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
        """A(X) or C A(X), (N, d), for the weight ``block`` (d, D)."""
        matrix = as_matrix(self.owner, self.weight).index_copy(0, self.rows, block)
        weight = matrix.T if is_transposed(self.owner) else matrix.view_as(self.weight)
        seen: list[Tensor] = []
        with _watch(self.site, seen), sdpa_kernel(SDPBackend.MATH):
            functional_call(self.site.module, {**self.state, self.parameter: weight}, self.args, self.kwargs)
        outputs = head_outputs(self.site, seen[-1])
        if self.conditioned:
            outputs = precondition(self.site, outputs)
        return outputs[self.sample, self.head]


@contextmanager
def _watch(site: AttentionSite, seen: list[Tensor]) -> Iterator[None]:
    """Collect what leaves the heads, with its derivatives."""
    owner = site.out.owner
    if not isinstance(owner, nn.MultiheadAttention):
        hook = owner.register_forward_pre_hook(lambda module, args: seen.append(args[0]), prepend=True)
        try:
            yield
        finally:
            hook.remove()
        return
    plain = not isinstance(owner, ConditionedMultiheadAttention)
    before = {name: owner.__dict__.get(name) for name in ("preconditioner", "head_norm")}
    become(owner, ConditionedMultiheadAttention)
    owner.preconditioner, owner.head_norm = RowPreconditioner(), _Tap(seen)
    try:
        yield
    finally:
        for name, value in before.items():
            owner.__dict__.pop(name) if value is None else owner.__dict__.__setitem__(name, value)
        if plain:
            restore(owner)


class _Tap:
    """In the place of a preconditioner: notes the head outputs, and leaves them as they are."""

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    def normalize(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x
