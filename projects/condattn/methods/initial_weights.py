"""Methods that set initial weights, and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from ..attention.site import AttentionSite
from .base import Method

MARK = "initialized_by"
"""The attribute of an attention module with the method that has set its initial weights."""
APART = 0x5EED
"""Makes the stream of :func:`random_numbers_apart` another one than that of its seed."""


@contextmanager
def random_numbers_apart() -> Iterator[None]:
    """Let what draws random numbers meanwhile leave those that are drawn afterwards as they would be without it.

    The numbers come from a stream of their own, which is a function of the state of PyTorch's CPU generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, ())) ^ APART)
        yield


class InitialWeightsMethod(Method):
    """Initial weights of a site: set when it is conditioned, and again after each initialisation of the model.

    OpenMMLab's models are initialised when a training starts (``init_weights``), before a checkpoint is loaded. The
    method changes no function: a model with it is the model without it, from other initial weights. Random numbers that
    it draws on the CPU leave all other initial weights as they are without the method. Subclasses implement
    :meth:`set_weights`.
    """

    changes_function: ClassVar[bool] = False

    @abstractmethod
    def set_weights(self, site: AttentionSite) -> None:
        """Write initial weights into the projections of ``site``; gradients are off."""

    @torch.no_grad()
    def initialize(self, site: AttentionSite) -> None:
        """Set the weights."""
        self.set_weights(site)

    def check(self, site: AttentionSite) -> None:
        """Raise if another method has set initial weights of ``site``."""
        if (other := getattr(site.module, MARK, None)) is not None:
            raise ValueError(
                f"{site}: its initial weights are set already, by {other}; two methods cannot set them: name one of "
                "them"
            )

    def apply(self, site: AttentionSite) -> None:
        """Set the weights, and note that they are."""
        self.initialize(site)
        setattr(site.module, MARK, self)

    @classmethod
    def applied_to(cls, site: AttentionSite) -> InitialWeightsMethod | None:
        """The method of this class that has set weights of ``site``, or None."""
        method: Any = getattr(site.module, MARK, None)
        return method if type(method) is cls else None

    @classmethod
    def remove(cls, site: AttentionSite) -> None:
        """Forget who has set them; the weights stay as they are."""
        delattr(site.module, MARK)
