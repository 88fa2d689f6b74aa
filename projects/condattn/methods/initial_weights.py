"""The base class of methods that only set initial weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from ..attention.site import AttentionSite
from ..layers.correction import CorrectedModule
from .base import Method

MARK = "initialized_by"
"""Name of the attribute of an attention module that holds the method that set its initial weights."""
APART = 0x5EED
"""Makes the stream of :func:`random_numbers_apart` differ from that of the seed that it is made of."""


@contextmanager
def random_numbers_apart() -> Iterator[None]:
    """Draw random numbers inside this context from a stream of their own, and continue with the former one afterwards.

    Code that runs after the context draws the same numbers as without it. This is true of the CPU: the stream is a
    function of the state of PyTorch's CPU generator. The generators of other devices are left alone.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would set the generators of all GPUs too.
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), device="cpu")) ^ APART)
        yield


class InitialWeightsMethod(Method):
    """Base class of methods that set the initial weights of a site.

    The weights are set when the site is conditioned, and again after each initialisation of the model. OpenMMLab's
    models are initialised when a training starts (``init_weights``), before a checkpoint is loaded. The method does not
    change the function of a model, which only starts from other weights. All other initial weights and later random
    numbers are those without the method if it draws its random numbers on the CPU, wherever the weights are. Subclasses
    implement :meth:`set_weights`.
    """

    changes_function: ClassVar[bool] = False

    @abstractmethod
    def set_weights(self, site: AttentionSite) -> None:
        """Write initial weights into the projections of ``site``; gradients are disabled.

        Draw random numbers on the CPU (``device="cpu"``); :meth:`.Projection.set_weight` copies them to the weights.
        """

    @torch.no_grad()
    def initialize(self, site: AttentionSite) -> None:
        """Set the initial weights of ``site``; corrections that depend on them are computed anew."""
        self.set_weights(site)
        for projection in filter(None, (site.q, site.k, site.v)):
            if isinstance(projection.owner, CorrectedModule):
                projection.owner.unsettle(projection.parameter)

    def check(self, site: AttentionSite) -> None:
        """Raise a ``ValueError`` if another method has set initial weights of ``site``."""
        if (other := getattr(site.module, MARK, None)) is not None:
            raise ValueError(
                f"{site}: its initial weights are set already, by {other}; two methods cannot set them: name one of "
                "them"
            )

    def apply(self, site: AttentionSite) -> None:
        """Set the weights, and record the method on the attention module."""
        self.initialize(site)
        setattr(site.module, MARK, self)

    @classmethod
    def applied_to(cls, site: AttentionSite) -> InitialWeightsMethod | None:
        """Return the method of this class that has set weights of ``site``, or None."""
        method: Any = getattr(site.module, MARK, None)
        return method if type(method) is cls else None

    @classmethod
    def remove(cls, site: AttentionSite) -> None:
        """Remove the record of the method; the weights stay as they are."""
        site.module.__dict__.pop(MARK, None)
