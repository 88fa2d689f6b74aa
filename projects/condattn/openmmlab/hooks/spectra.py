"""Log the condition numbers of attention while a model trains."""

import copy
import math
import time
from collections.abc import Sequence

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from ...attention.rules import find_sites
from ...spectra import Measurement, measure
from ...spectra.advice import find_warnings
from ...spectra.measure import spread
from ..models.forward import forward, learner, prepare, supervised
from ..models.wrapping import unwrapped

PLAIN = str.maketrans("", "", "() ")
"""Translation that removes the characters which some loggers do not accept in names."""


@HOOKS.register_module()
class SpectraHook(Hook):
    """Measure attention at regular intervals on the first images of the batch, and log it to the run's visualizer.

    Each measured site has scalars named 'spectra/SITE/QUANTITY'. These are medians over heads, images and windows of
    kappa_W_Q and sigma_min_W_Q (of W + C if there is a correction), the same of W_K, W_V, map, AX and CAX, and entropy
    (as a fraction of the largest possible), and the maximum of the logits. kappa and sigma_min are of the smallest
    singular value that is not zero. Jacobians are those of the first head, kappa_dAX_dW_Q and so on, with the bound of
    Thm 3.4 on all three. The training stays bitwise the same, and an error in a measurement does not stop it. In a
    distributed run rank 0 measures.

    Args:
        interval: Iterations between measurements; the first one follows the first iteration.
        quantities: See :func:`condattn.spectra.measure`.
        max_sites: Maximum number of measured sites, evenly spaced over the model.
        images: Number of images of the batch that are used.
        heads: Also log every head, as 'spectra/SITE/QUANTITY_head_0' and so on, and measure the Jacobians of all heads.

    Raises:
        ValueError: If a number is not positive.
    """

    priority = "LOW"

    def __init__(
        self,
        interval: int = 500,
        quantities: Sequence[str] = ("weights", "outputs", "entropy"),
        max_sites: int = 6,
        images: int = 1,
        heads: bool = False,
    ) -> None:
        for name, value in dict(interval=interval, max_sites=max_sites, images=images).items():
            if value < 1:
                raise ValueError(f"SpectraHook: {name} is {value}; expected at least 1")
        self.interval, self.quantities, self.max_sites, self.images = interval, tuple(quantities), max_sites, images
        self.heads = heads
        self._seconds, self._began, self._failed = 0.0, 0.0, False

    def before_train(self, runner: Runner) -> None:
        """Start timing."""
        self._seconds, self._began = 0.0, time.monotonic()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Measure if a measurement is due."""
        due = runner.iter == 0 or self.every_n_train_iters(runner, self.interval)
        if due and is_main_process() and not self._failed:
            began = time.monotonic()
            try:
                self._measure(runner, data_batch)
            except Exception as error:  # a failed measurement must not stop the training
                self._failed = True
                reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
                runner.logger.warning(f"SpectraHook measures no more in this run: {reason}")
            self._seconds += time.monotonic() - began

    def after_train(self, runner: Runner) -> None:
        """Log the time that the measurements took."""
        if is_main_process():
            share = self._seconds / (time.monotonic() - self._began)
            runner.logger.info(f"SpectraHook took {self._seconds:.1f} s, {share:.2%} of the training")

    def _measure(self, runner: Runner, batch: dict) -> None:
        model = unwrapped(runner.model)
        names = [site.name for site in find_sites(learner(model))]
        first = {name: copy.deepcopy(values[: self.images]) for name, values in supervised(model, batch).items()}
        number = min(map(len, first.values()))
        singles = [{name: values[i : i + 1] for name, values in first.items()} for i in range(number)]

        def run() -> None:
            for image in singles:
                forward(model, prepare(model, image, training=False))

        sites, max_heads = spread(names, self.max_sites), None if self.heads else 1
        measurement = measure(learner(model), run, self.quantities, sites, max_heads=max_heads)
        values = {f"spectra/{name}": value for name, value in scalars(measurement, self.heads).items()}
        runner.visualizer.add_scalars(values, step=runner.iter + 1)
        is_last = runner.iter + self.interval >= runner.max_iters
        for line in find_warnings({"": measurement}, trained=is_last):
            runner.logger.warning(line)


def scalars(measurement: Measurement, each_head: bool = False) -> dict[str, float]:
    """Return 'SITE/QUANTITY' -> median over heads and samples, maximum for logits; values not finite are left out.

    With ``each_head`` there is also 'SITE/QUANTITY_head_H' for each head H, the median over samples.
    """
    found: dict[str, float] = {}

    def add(name: str, values: Tensor, largest: bool = False) -> None:
        """Add values of the shape (samples, heads)."""
        found[name] = (values.max() if largest else values.nanmedian()).item()
        if each_head:
            heads = values.amax(0) if largest else values.nanmedian(0).values
            found.update({f"{name}_head_{head}": value for head, value in enumerate(heads.tolist())})

    for one in measurement.spectra:
        if measurement.is_used(one) or "A(X)" in one.matrix:
            name = one.matrix.removesuffix(" + C").translate(PLAIN)
            add(f"{one.site}/kappa_{name}", measurement.kappa(one.site, one.matrix))
            add(f"{one.site}/sigma_min_{name}", measurement.sigma_min(one.site, one.matrix))
    for site in dict.fromkeys(one.site for one in measurement.entropies):
        add(f"{site}/entropy", measurement.relative_entropy(site))
        logits = torch.cat([one.largest_logit for one in measurement.entropies if one.site == site])
        add(f"{site}/largest_logit", logits, largest=True)
    jacobians: dict[str, list[float]] = {}
    for one in measurement.jacobians:
        name = f"{one.site}/kappa_d{one.output.translate(PLAIN)}_d{one.weight}"
        jacobians.setdefault(name, []).append(one.extremes.kappa)
    for (site, _), bound in measurement.bounds.items():
        jacobians.setdefault(f"{site}/bound", []).append(bound.value)
    for name, kappas in jacobians.items():
        add(name, torch.tensor([kappas], dtype=torch.float64))
    return {name: value for name, value in found.items() if math.isfinite(value)}
