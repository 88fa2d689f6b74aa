"""Conditioned embedded tokens, "CT" (arXiv 2505.12789): X + C, with kappa <= 2, enters the first block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..attention.rules import find_sites
from ..attention.site import AttentionSite, Place, is_within
from ..attention.tokens import find_token_entries
from ..kernels.polar import newton_schulz_correction, svd_correction
from ..layers.input_transform import TokenCorrection
from .base import check_flags, register_method
from .model_input import ModelInputMethod

FORMS = ("svd", "newton_schulz")


@register_method
@dataclass(frozen=True)
class EmbeddedTokens(ModelInputMethod):
    """X + C in place of the embedded tokens X of each sample, C = sigma_max(X) U V^T by its decomposition U S V^T.

    X, (tokens, channels), is what enters the first block: after positions, class token, patch norm and dropout. That is
    our reading of the paper's "embedded tokens". Padding of images consists of tokens like others and takes part;
    tokens that a mask excludes do not. kappa(X + C) <= 2 holds for the singular values that are larger than
    rounding errors of the precision in which the tokens were computed (3e-5 of the largest in single precision, and
    more for over 4,096 tokens; see :func:`condattn.kernels.polar.svd_correction`). The others are not corrected, and
    their ratio to the largest doubles. Adds no parameter.

    Attributes:
        form: 'svd' decomposes the tokens in every forward, as the paper does. 'newton_schulz' approximates C by
            products of matrices alone; see :func:`condattn.kernels.polar.newton_schulz_correction`.
        detach: If True, C is a constant in backpropagation; if False, the gradient is that of the forward pass. The
            paper does not say which.
        iterations: Number of Newton-Schulz iterations.

    Raises:
        ValueError: If a setting is not one of these.
    """

    alias: ClassVar[str] = "ct"
    gradient_settings = ("detach",)

    form: str = "svd"
    detach: bool = True
    iterations: int = 12

    def __post_init__(self):
        check_flags(self, "detach")
        if self.form not in FORMS:
            raise ValueError(f"EmbeddedTokens: form is {self.form!r}; expected one of {', '.join(map(repr, FORMS))}")
        if type(self.iterations) is not int or self.iterations < 1:
            raise ValueError(f"EmbeddedTokens: iterations is {self.iterations!r}; expected a whole number from 1 up")

    def correction(self, x: Tensor, zero: float | None = None) -> Tensor:
        """C of tokens (batch, tokens, channels) in single or double precision; see :class:`TokenCorrection`."""
        if self.form == "svd":
            return svd_correction(x, self.detach, zero)
        return newton_schulz_correction(x, self.iterations, self.detach, zero)

    @classmethod
    def places(cls, model: nn.Module, sites: Sequence[AttentionSite]) -> Sequence[Place]:
        """The first blocks in ``model``, by the rules of :mod:`condattn.attention.tokens`.

        A model whose attention sites are all left out (``include``, ``exclude``) is left out too.
        """
        chosen, known = {site.name for site in sites}, [site.name for site in find_sites(model)]
        entries = [
            entry
            for entry in find_token_entries(model)
            if not (inside := [name for name in known if is_within(name, entry.model)]) or chosen & set(inside)
        ]
        if not entries:
            raise ValueError("include and exclude leave no model whose embedded tokens could be conditioned")
        return entries

    def check(self, place: Any) -> None:
        """Raise if the tokens must not be mixed, or another method changes them."""
        if place.obstacle:
            raise ValueError(f"{place}: its embedded tokens cannot be conditioned: {place.obstacle}")
        super().check(place)

    def input_transform(self, place: Any) -> TokenCorrection:
        """The hook of the first block."""
        return TokenCorrection(self.correction, self, place.layout, place.mask)
