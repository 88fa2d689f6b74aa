"""Condition numbers of attention: of its weights, maps, outputs and Jacobians, for each site and head of any model.

A(X) = softmax(X W_Q W_K^T X^T / sqrt(d)) X W_V is the output of a head, N tokens x d; kappa(M) = sigma_max / sigma_min,
with the smallest singular value that is not zero, for a matrix that is singular has no other.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.correction import CorrectedModule
from ..methods.preconditioner import RowPreconditioner
from ..sites import AttentionSite, find_sites
from .capture import Seen, capture, precondition
from .jacobian import Bound, Jacobian, head_bound, head_jacobians
from .weights import Spectrum, spectrum, weight_spectra

QUANTITIES = ("weights", "map", "outputs", "entropy")
"""What :func:`measure` measures by default; it can also measure the 'jacobian', which takes long."""


@dataclass(frozen=True)
class Entropy:
    """How far attention is spread at one site.

    Attributes:
        site: Name of the site.
        values: Mean over the rows of the map of their entropy, in nats, (samples, heads); log(keys) where uniform.
        keys: Number of keys M.
        largest_logit: Largest finite entry of the softmax's input, bias and mask included, (samples, heads).
    """

    site: str
    values: Tensor
    keys: int
    largest_logit: Tensor

    @property
    def relative(self) -> Tensor:
        """The entropy as a share of log(keys), (samples, heads); NaN for one key."""
        return self.values / math.log(self.keys) if self.keys > 1 else torch.full_like(self.values, torch.nan)


@dataclass
class Measurement:
    """What :func:`measure` found.

    Attributes:
        sites: Name of each measured site -> its number among the sites of the model, from 0.
        preconditioned: Those of them that compute with C A(X).
        spectra: Singular values.
        entropies: Spread of attention.
        jacobians: Jacobians of heads.
        bounds: (site, head) -> what Thm 3.4 bounds their condition numbers by.
        left_out: Quantity of a site that could not be measured -> why, as ('backbone.attn', 'map').
    """

    sites: dict[str, int]
    preconditioned: set[str] = field(default_factory=set)
    spectra: list[Spectrum] = field(default_factory=list)
    entropies: list[Entropy] = field(default_factory=list)
    jacobians: list[Jacobian] = field(default_factory=list)
    bounds: dict[tuple[str, int], Bound] = field(default_factory=dict)
    left_out: dict[tuple[str, str], str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each site, head and matrix, and one for each site and head of entropy: medians of samples.

        Columns: site, depth (from 0), head, quantity; sigma_max, sigma_min, kappa, kappa_max (over the samples), rank,
        singular (the share of singular samples), size; or entropy (nats), relative_entropy, largest_logit; samples. A
        Jacobian is the quantity 'dA(X)/dW_Q', and has besides residual and the columns of its bound. ``used`` says
        whether the model computes with it: with W + C, not W, where there is a correction, with C A(X) where there is a
        preconditioner.
        """
        corrected = {(one.site, one.matrix.removesuffix(" + C")) for one in self.spectra if one.matrix.endswith("+ C")}

        rows = []
        for one in self.spectra:
            for head in range(one.values.shape[1]):
                conditioned = one.site in self.preconditioned
                unused = {"A(X)": conditioned, "C A(X)": not conditioned}
                part = {name: getattr(one, name)[:, head] for name in ("sigma_max", "sigma_min", "kappa", "rank")}
                rows.append(
                    dict(site=one.site, depth=self.sites[one.site], head=head, quantity=one.matrix)
                    | {name: _median(values) for name, values in part.items()}
                    | dict(
                        used=not unused.get(one.matrix, (one.site, one.matrix) in corrected),
                        kappa_max=part["kappa"].max().item(),
                        singular=one.singular[:, head].double().mean().item(),
                        size=f"{one.size[0]} x {one.size[1]}",
                        samples=len(one.values),
                    )
                )
        for one in self.entropies:
            for head in range(one.values.shape[1]):
                rows.append(
                    dict(
                        site=one.site,
                        depth=self.sites[one.site],
                        head=head,
                        quantity="entropy",
                        entropy=_median(one.values[:, head]),
                        relative_entropy=_median(one.relative[:, head]),
                        largest_logit=one.largest_logit[:, head].max().item(),
                        samples=len(one.values),
                    )
                )
        for one in self.jacobians:
            extremes, bound = one.extremes, self.bounds.get((one.site, one.head))
            rows.append(
                dict(
                    site=one.site,
                    depth=self.sites[one.site],
                    head=one.head,
                    quantity=f"d{one.output}/d{one.weight}",
                    sigma_max=extremes.sigma_max,
                    sigma_min=extremes.sigma_min,
                    kappa=extremes.kappa,
                    rank=extremes.rank,
                    size=f"{extremes.size[0]} x {extremes.size[1]}",
                    residual=extremes.residual,
                    samples=1,
                )
                | (dict(bound=bound.value) | {f"bound_{k}": v for k, v in asdict(bound).items()} if bound else {})
            )
        return rows


Inputs = Tensor | Callable[[], object] | Iterable[Tensor | Mapping[str, Any] | Sequence[Any]] | None


def measure(
    model: nn.Module,
    inputs: Inputs = None,
    quantities: Sequence[str] = QUANTITIES,
    sites: Sequence[str] | None = None,
    max_samples: int = 32,
    max_tokens: int = 1024,
    max_heads: int | None = None,
) -> Measurement:
    """Measure the attention of a model, and leave the model as it was: state, modes and random numbers.

    Args:
        model: Any model with attention sites, conditioned or not.
        inputs: A tensor, the model's input; an iterable of inputs (tensors, positional or keyword arguments); or a
            function that runs the model. Only ``'weights'`` can do without.
        quantities: Which of ``QUANTITIES``: 'weights' are the singular values of W_Q, W_K and W_V of each head, and of
            W + C where there is a correction; 'map' those of the attention map; 'outputs' those of A(X) and C A(X);
            'entropy' the spread of attention; 'jacobian' the extreme singular values of the Jacobians of the heads, for
            the first image or window of each site.
        sites: Names of sites to measure; default: all.
        max_samples: Of the images or windows that one call of a site sees, so many are measured, evenly spread.
        max_tokens: Maps with more rows are left out, their singular values would take too long; and Jacobians.
        max_heads: Jacobians of the first heads of each site alone; None: of all.

    Returns:
        The measurement. Each site computes again in float64 from the input that it got, so that condition numbers are
        not those of rounding.

    Raises:
        ValueError: For an unknown quantity or site, a model without sites, weights or outputs that are not finite, or
            inputs that are missing or reach no site.
    """
    known = (*QUANTITIES, "jacobian")
    if unknown := [name for name in quantities if name not in known]:
        raise ValueError(f"unknown quantity {unknown[0]!r}; known are {', '.join(known)}")
    found = _select(model, sites)
    depths = {site.name: depth for depth, site in enumerate(find_sites(model))}
    preconditioned = {site.name for site in found if RowPreconditioner.applied_to(site)}
    measurement = Measurement({site.name: depths[site.name] for site in found}, preconditioned)
    wanted = [name for name in quantities if name != "weights"]
    if wanted and inputs is None:
        raise ValueError(
            f"{', '.join(wanted)} of attention depend on the input; give inputs, or quantities=['weights']"
        )
    with unchanged(model):
        if "weights" in quantities:
            for site in found:
                measurement.spectra += weight_spectra(site)
        if wanted:
            _measure_run(model, found, inputs, wanted, measurement, max_samples, max_tokens, max_heads)
    return measurement


def _select(model: nn.Module, names: Sequence[str] | None) -> list[AttentionSite]:
    found = find_sites(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention site; there is nothing to measure")
    known = [site.name for site in found]
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"no attention site is called {unknown[0]!r}; the model has {', '.join(known[:3])}, ...")
    return [site for site in found if names is None or site.name in names]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards modes, random numbers, and constants that were not fixed yet are as before."""
    training = [(module, module.training) for module in model.modules()]
    unsettled = [(m, m.unsettled) for m in model.modules() if isinstance(m, CorrectedModule) and m.unsettled]
    waiting = [getattr(m, f"{name}_correction") for m, names in unsettled for name in names]
    waiting = [(buffer, buffer.clone()) for buffer in waiting]
    plain = [
        value for m in model.modules() for name, value in vars(m).items() if name[0] != "_" and type(value) is dict
    ]
    caches = [(value, dict(value)) for value in plain]  # of biases, in evaluation mode
    python = random.getstate()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            random.setstate(python)
            for module, mode in training:
                module.training = mode
            for module, names in unsettled:
                module.unsettled = names
            for buffer, before in waiting:
                buffer.copy_(before)
            for cache, before in caches:
                cache.clear()
                cache.update(before)


def _measure_run(
    model: nn.Module,
    sites: list[AttentionSite],
    inputs: Inputs,
    quantities: list[str],
    measurement: Measurement,
    max_samples: int,
    max_tokens: int,
    max_heads: int | None,
) -> None:
    parts: dict[tuple[str, str], list[Any]] = {}

    def observe(site: AttentionSite, seen: Seen) -> None:
        if "jacobian" in quantities and site.name not in {one.site for one in measurement.jacobians}:
            _measure_jacobians(site, seen, measurement, max_tokens, max_heads)
        for name, value in _look(site, seen, quantities, max_samples, max_tokens):
            if isinstance(value, str):
                measurement.left_out[site.name, name] = value
            else:
                parts.setdefault((site.name, name), []).append(value)

    with capture(sites, observe):
        _run(model, inputs)
    if not parts and not measurement.left_out:
        raise ValueError("no input reached an attention site; is the model called at all?")
    for name in measurement.sites:
        for (site, _), values in parts.items():
            if site == name:
                (measurement.entropies if isinstance(values[0], Entropy) else measurement.spectra).extend(_join(values))


def _measure_jacobians(
    site: AttentionSite, seen: Seen, measurement: Measurement, max_tokens: int, max_heads: int | None
) -> None:
    if seen.outputs is None or seen.outputs.shape[2] > max_tokens:
        tokens = "cannot be seen" if seen.outputs is None else f"have more than {max_tokens} tokens"
        measurement.left_out[site.name, "jacobian"] = f"its head outputs {tokens}"
        return
    for head in range(min(site.num_heads, max_heads or site.num_heads)):
        try:
            measurement.jacobians += head_jacobians(site, seen, head)
        except ValueError as error:
            measurement.left_out[site.name, "jacobian"] = str(error)
            return
        try:
            measurement.bounds[site.name, head] = head_bound(site, seen, head)
        except ValueError as error:
            measurement.left_out[site.name, "bound"] = str(error)


def _run(model: nn.Module, inputs: Inputs) -> None:
    if isinstance(inputs, Tensor):
        model(inputs)
    elif callable(inputs):
        inputs()
    else:
        for one in inputs:
            if isinstance(one, Mapping):
                model(**one)
            else:
                model(*([one] if isinstance(one, Tensor) else one))


def _look(
    site: AttentionSite, seen: Seen, quantities: list[str], max_samples: int, max_tokens: int
) -> Iterator[tuple[str, Spectrum | Entropy | str]]:
    """What one call of a site contributes: name and value, or why there is none."""
    if {"map", "entropy"} & set(quantities):
        if seen.map is None:
            for name in {"map", "entropy"} & set(quantities):
                yield name, "it computes no softmax over its keys"
        else:
            chosen = _spread(len(seen.map), max_samples)
            weights, logits = seen.map[chosen].double(), seen.logits[chosen].double()
            _check_finite(site, "the attention map", weights)
            if "entropy" in quantities:
                entropy = torch.special.entr(weights).sum(-1).mean(-1)
                largest = logits.masked_fill(~logits.isfinite(), -torch.inf).amax((-2, -1))
                yield "entropy", Entropy(site.name, entropy.cpu(), weights.shape[-1], largest.cpu())
            if "map" in quantities:
                if max(weights.shape[-2:]) > max_tokens:
                    yield "map", f"it has {max(weights.shape[-2:])} tokens, more than {max_tokens}"
                else:
                    yield "map", spectrum(site.name, "map", seen.map[chosen])
    if "outputs" in quantities:
        if seen.outputs is None:
            yield "outputs", "its head outputs cannot be seen"
        else:
            outputs = seen.outputs[_spread(len(seen.outputs), max_samples)]
            _check_finite(site, "A(X)", outputs)
            yield "A(X)", spectrum(site.name, "A(X)", outputs)
            yield "C A(X)", spectrum(site.name, "C A(X)", precondition(site, outputs))


def _check_finite(site: AttentionSite, what: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{site}: {what} has values that are not finite; is the checkpoint whole?")


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the first ``count`` numbers, evenly spread."""
    most = min(count, most)
    return [i * count // most for i in range(most)]


def _join(values: list[Spectrum] | list[Entropy]) -> list[Any]:
    """One entry for all samples of the same size."""
    groups: dict[Any, list[Any]] = {}
    for one in values:
        groups.setdefault(one.size if isinstance(one, Spectrum) else one.keys, []).append(one)
    joined = []
    for group in groups.values():
        first = group[0]
        fields = ("values",) if isinstance(first, Spectrum) else ("values", "largest_logit")
        joined.append(replace(first, **{name: torch.cat([getattr(one, name) for one in group]) for name in fields}))
    return joined


def _median(values: Tensor) -> float:
    return values.double().median().item()
