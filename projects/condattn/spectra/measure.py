"""Condition numbers of attention: of its weights, maps, outputs and Jacobians, for each site and head of any model.

A(X) = softmax(X W_Q W_K^T X^T / sqrt(d)) X W_V is the output of a head, N tokens x d. kappa(M) = sigma_max / sigma_min,
where sigma_min is the smallest nonzero singular value, so that kappa is defined for singular matrices as well.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.rules import find_sites
from ..attention.site import AttentionSite
from ..layers.correction import CorrectedModule
from ..layers.head_transform import head_transform_of
from ..wording import some
from .bound import head_bound
from .capture import Seen, capture, precondition
from .entropy import Entropy, entropy
from .extremes import HAS_SCIPY, RELIABLE
from .jacobian import head_jacobians
from .results import Measurement
from .weights import Spectrum, spectrum, weight_spectra

QUANTITIES = ("weights", "map", "outputs", "entropy")
"""What :func:`measure` measures by default; it can also measure 'jacobian', which takes long."""


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
    """Measure the attention of a model, without changing its state, its modes or the state of random numbers.

    Args:
        model: Any model with attention sites, conditioned or not.
        inputs: A tensor, the model's input; an iterable of inputs (tensors, positional or keyword arguments); or a
            function that runs the model. Only ``'weights'`` can be measured without inputs.
        quantities: Which quantities to measure: 'weights' are the singular values of W_Q, W_K and W_V of each head, and
            of W + C if there is a correction; 'map' those of the attention map; 'outputs' those of A(X) and C A(X);
            'entropy' is the spread of attention; 'jacobian' the extreme singular values of the Jacobians of the heads,
            for the first image or window of each site.
        sites: Names of sites to measure; default: all.
        max_samples: Maximum number of images or windows to measure in one call of a site; they are evenly spread.
        max_tokens: Maps with more rows are left out, because their singular values would take too long; Jacobians as
            well.
        max_heads: Number of heads of each site, from the first one, whose Jacobians are measured; None: all heads.

    Returns:
        The measurement. Each site is recomputed in float64 from its inputs, so that condition numbers are not those of
        rounding errors; ``limits`` of the measurement says where that was impossible.

    Raises:
        ModuleNotFoundError: For Jacobians without scipy.
        ValueError: For an unknown quantity or site, a model without sites, weights or outputs that are not finite, or
            inputs that are missing or reach no site.
    """
    if "jacobian" in quantities and not HAS_SCIPY:
        raise ModuleNotFoundError("measuring Jacobians needs numpy and scipy: pip install numpy scipy")
    known = (*QUANTITIES, "jacobian")
    if unknown := [name for name in quantities if name not in known]:
        raise ValueError(f"unknown quantity {unknown[0]!r}; known are {', '.join(known)}")
    found = _select(model, sites)
    depths = {site.name: depth for depth, site in enumerate(find_sites(model))}
    preconditioned = {site.name for site in found if head_transform_of(site)}
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
        raise ValueError(f"no attention site is called {unknown[0]!r}; the model has {some(known)}")
    return [site for site in found if names is None or site.name in names]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode while the context is active, and restore its state afterwards.

    The state is modes, random numbers, caches of modules, and corrections that were not fixed yet.
    """
    training = [(module, module.training) for module in model.modules()]
    unsettled = [(m, m.unsettled) for m in model.modules() if isinstance(m, CorrectedModule) and m.unsettled]
    waiting = [getattr(m, name) for m, names in unsettled for name in names]
    waiting = [(buffer, buffer.clone()) for buffer in waiting]
    attributes = [item for module in model.modules() for item in vars(module).items()]
    # Some modules cache biases in evaluation mode.
    caches = [(value, dict(value)) for name, value in attributes if name[0] != "_" and type(value) is dict]
    numpy = sys.modules.get("numpy")  # whose numbers are restored only if something uses them
    python, numbers = random.getstate(), numpy and numpy.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(numbers)
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
    differentiated: set[str] = set()

    def observe(site: AttentionSite, seen: Seen) -> None:
        if "jacobian" in quantities and site.name not in differentiated:
            differentiated.add(site.name)
            _measure_jacobians(site, seen, measurement, max_tokens, max_heads)
        if seen.limit and {"map", "outputs"} & set(quantities):
            measurement.limits[site.name] = seen.limit
        for name, value in _results_of_call(site, seen, quantities, max_samples, max_tokens):
            if isinstance(value, str):
                measurement.left_out[site.name, name] = value
            else:
                parts.setdefault((site.name, name), []).append(value)

    with capture(sites, observe):
        _run(model, inputs)
    if not (parts or measurement.jacobians or measurement.left_out):
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
    _check_finite(site, "A(X)", seen.outputs)
    for head in range(min(site.num_heads, max_heads or site.num_heads)):
        found, failed = head_jacobians(site, seen, head)
        measurement.jacobians += found
        for name, error in failed.items():
            reason = " ".join(str(error).split())[:160]
            measurement.left_out[site.name, name] = f"{type(error).__name__}: {reason}"
        for one in found:
            if one.extremes.residual > RELIABLE:
                name = f"smallest singular value of d{one.output}/d{one.weight}"
                measurement.left_out[site.name, name] = f"it did not converge (residual {one.extremes.residual:.1g})"
        try:
            if {one.weight for one in found if one.plain} != {"W_Q", "W_K", "W_V"}:
                raise ValueError(f"{site}: its derivative is not that of the attention that Thm 3.4 is of")
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


def _results_of_call(
    site: AttentionSite, seen: Seen, quantities: list[str], max_samples: int, max_tokens: int
) -> Iterator[tuple[str, Spectrum | Entropy | str]]:
    """Yield what one call of a site contributes: name and value, or why there is none."""
    if {"map", "entropy"} & set(quantities):
        if seen.map is None:
            for name in {"map", "entropy"} & set(quantities):
                yield name, "no softmax over its keys is seen whose result is what is multiplied, head by head"
        else:
            chosen = spread(range(len(seen.map)), max_samples)
            _check_finite(site, "the attention map", seen.map[chosen])
            tokens = max(seen.map.shape[-2:])
            if "entropy" in quantities:
                yield "entropy", entropy(site.name, seen, chosen)
            if "map" in quantities:
                if tokens > max_tokens:
                    yield "map", f"it has {tokens} tokens, more than {max_tokens}"
                else:
                    yield "map", spectrum(site.name, "map", seen.map[chosen], seen.dtype)
    if "outputs" in quantities:
        if seen.outputs is None:
            yield "outputs", "its head outputs cannot be seen"
        else:
            outputs = seen.outputs[spread(range(len(seen.outputs)), max_samples)]
            _check_finite(site, "A(X)", outputs)
            yield "A(X)", spectrum(site.name, "A(X)", outputs, seen.dtype)
            yield "C A(X)", spectrum(site.name, "C A(X)", precondition(site, outputs), seen.dtype)


def _check_finite(site: AttentionSite, what: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{site}: {what} has values that are not finite; is the checkpoint damaged?")


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` of the items, evenly spread."""
    most = min(len(items), most)
    return [items[i * len(items) // most] for i in range(most)]


def _join(values: list[Spectrum] | list[Entropy]) -> list[Any]:
    """Join the results of all samples of the same size and precision into one entry."""
    groups: dict[Any, list[Any]] = {}
    for one in values:
        groups.setdefault((one.size, one.dtype) if isinstance(one, Spectrum) else one.keys, []).append(one)
    joined = []
    for group in groups.values():
        first = group[0]
        fields = ("values",) if isinstance(first, Spectrum) else ("values", "largest", "largest_logit")
        joined.append(replace(first, **{name: torch.cat([getattr(one, name) for one in group]) for name in fields}))
    return joined
