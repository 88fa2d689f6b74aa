"""Calibrate a model with transformed head outputs, to start close to the function that its weights were trained for.

Weights trained with plain softmax attention expect untransformed head outputs, whereas the row preconditioner, for
example, gives every row the norm 1. Calibration multiplies each head's columns of the output projection by the factor
that brings the transformed outputs closest to the plain ones on real inputs. With the preconditioner, the factor is the
mean row norm of the head, and the remaining error is the variation of the norms from row to row. No parameter is added.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention.adapters import inner, is_at_work
from ..attention.rules import find_sites
from ..attention.site import AttentionSite, as_matrix, is_convolution, is_transposed
from ..attention.stored import check_writable
from ..kernels.switch import plain
from ..layers.head_transform import HeadTransform, HeadTransformLinear, head_transform_of

TRANSPARENT = nn.Identity | nn.Dropout | nn.Upsample
"""Modules before the output projection that do not change the scale of single heads, except at random."""


@dataclass
class Calibration:
    """Result of calibrating one site.

    Attributes:
        site: Name of the site.
        scales: Factor of each head, (num_heads,), by which its columns were multiplied; see
            :meth:`~condattn.layers.head_transform.HeadTransform.scales`.
        before: Relative error of the output projection's output before calibration, compared with the plain function on
            the same inputs: the norm of the difference divided by the norm of the output.
        after: The relative error after calibration.
        reason: Why the site was not calibrated, or ''.
    """

    site: str
    scales: Tensor | None = None
    before: float = float("nan")
    after: float = float("nan")
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.site}: left alone, {self.reason}"
        return f"{self.site}: relative error of the output {self.before:.3f} before, {self.after:.3f} after"


@torch.no_grad()
def calibrate(
    model: nn.Module,
    run: Callable[[], object],
    reduce: Callable[[Tensor], Tensor] = lambda value: value,
) -> list[Calibration]:
    """Multiply a factor for each head into the output projections of sites with transformed head outputs, in place.

    Args:
        model: A model with such sites (``'pc'``), whose weights were trained without the transforms.
        run: Runs the model on inputs that represent its data. It is called twice, and must do the same each time. The
            transforms are disabled while it runs.
        reduce: Averages a tensor over all processes, if the run is distributed.

    Returns:
        One entry for each site whose head outputs are transformed.

    Raises:
        ValueError: If the model has no such site, ``run`` reaches none of them, or the weight of an output projection
            is computed (pruned, or parametrized), or is that of another layer as well.
    """
    found = [site for site in find_sites(model) if head_transform_of(site)]
    if not found:
        name = type(model).__name__
        raise ValueError(f"{name} has no site whose head outputs are changed; condition it with 'pc' first")
    probes = {site.name: _Probe(site) for site in found}
    check_writable(model, [(probe.site.out.projection, "weight") for probe in probes.values() if not probe.reason])
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        for step in ("measure", "compare"):
            with _transforms_disabled(found, {name: getattr(probe, step) for name, probe in probes.items()}):
                run()
            if step == "measure":
                for probe in probes.values():
                    probe.settle(reduce)
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
    if all(probe.scales is None for probe in probes.values()):
        raise ValueError(f"no input reached an attention site of {type(model).__name__}")
    return [probe.fold() for probe in probes.values()]


@contextmanager
def _transforms_disabled(sites: list[AttentionSite], observers: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Disable the transforms, and pass the head outputs to the observers instead."""
    transforms: list[HeadTransform] = [inner(site.out.owner).head_transform for site in sites]
    try:
        for site, transform in zip(sites, transforms, strict=True):
            transform.observer = observers[site.name]
        with plain():  # fast paths would apply the transforms themselves
            yield
    finally:
        for transform in transforms:
            transform.observer = None


class _Probe:
    """Measures one site in two passes, and then calibrates it."""

    def __init__(self, site: AttentionSite) -> None:
        self.site, self.transform = site, inner(site.out.owner).head_transform
        self.sum, self.count, self.scales = None, 0, None
        self.errors = torch.zeros(3, dtype=torch.float64)

    def measure(self, x: Tensor) -> None:
        """Accumulate the factors, in the first pass."""
        self.sum = self.transform.scales(x) + (0 if self.sum is None else self.sum)
        self.count += 1

    def settle(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Average the factors over all batches of all processes, between the passes.

        Every process takes part, also one in which no input reached the site: the others wait for it.
        """
        if self.sum is None:
            device = next((p.device for p in self.site.module.parameters()), None)
            self.sum = torch.zeros(self.transform.num_heads, dtype=torch.float64, device=device)
        *total, count = reduce(torch.cat([self.sum, self.sum.new_tensor([self.count])]))
        if count > 0:
            self.scales = torch.stack(total) / count

    def compare(self, x: Tensor) -> None:
        """Accumulate the errors of the projection's output without and with the factors, in the second pass."""
        if self.reason or self.scales is None:
            return
        wide = x.double()
        rows = self.transform.compute(wide)
        plain = self._project(wide)
        ones = torch.ones_like(self.scales)
        for index, scales in enumerate((ones, self.scales)):
            difference = self._project(self._scale(rows, scales)) - plain
            self.errors[index] += difference.square().sum().cpu()
        self.errors[2] += plain.square().sum().cpu()

    def fold(self) -> Calibration:
        """Multiply the columns of the projection by the factors."""
        if self.scales is None:
            return Calibration(self.site.name, reason="because no input reached it")
        if self.reason:
            return Calibration(self.site.name, reason=self.reason)
        projection = self.site.out.projection
        matrix = as_matrix(projection, projection.weight)
        matrix.mul_(self._columns(self.scales, matrix.shape[1]).to(matrix.dtype))
        before, after = (self.errors[:2] / self.errors[2].clamp_min(1e-300)).sqrt().tolist()
        return Calibration(self.site.name, self.scales, before, after)

    @cached_property
    def reason(self) -> str:
        """Why the factors cannot be multiplied into the projection, or ''."""
        owner, projection = self.site.out.owner, self.site.out.projection
        if is_at_work(owner):
            return "because an adapter is around its output projection; merge it before"
        if isinstance(inner(owner), HeadTransformLinear) and type(inner(owner)) is not HeadTransformLinear:
            return f"because a {type(inner(owner)).__name__} does more to its head outputs than transform them"
        gated = getattr(self.site.module, "gate", None) is not None
        direct = inner(owner) is projection or isinstance(owner, nn.MultiheadAttention | TRANSPARENT)
        if gated and inner(owner) is not projection:
            return "because a gate stands between its heads and the output projection"
        if not direct:
            return f"because a {type(owner).__name__} stands between its heads and the output projection"
        pointwise = is_convolution(projection) and set(projection.kernel_size) == {1} and projection.groups == 1
        if not (isinstance(projection, nn.Linear) or pointwise or is_transposed(projection)):
            return f"because its output projection is a {type(projection).__name__}"
        return ""

    def _columns(self, scales: Tensor, channels: int) -> Tensor:
        """Return the factor of each input channel of the projection."""
        inside = self.transform.channels or slice(0, channels)
        size = (inside.stop - inside.start) // len(scales)
        factors = scales.repeat(size) if self.transform.interleaved else scales.repeat_interleave(size)
        columns = torch.ones(channels, dtype=scales.dtype, device=scales.device)
        columns[inside] = factors
        return columns

    def _scale(self, x: Tensor, scales: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.transform.axis] = -1
        return x * self._columns(scales, x.shape[self.transform.axis]).reshape(shape)

    def _project(self, x: Tensor) -> Tensor:
        projection = self.site.out.projection
        weight = projection.weight.double()
        bias = projection.bias.double() if projection.bias is not None else None
        axis = self.transform.axis
        return F.linear(x.movedim(axis, -1), as_matrix(projection, weight), bias).movedim(-1, axis)
