"""The base class of methods that transform the outputs of each head."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import nn

from ..attention.adapters import inner, is_copying
from ..attention.site import AttentionSite, HeadOutputs
from ..layers.class_swap import check_can_swap, has_own_forward, leave_out, refuse_scripting, restore_class, swap_class
from ..layers.head_transform import PLAIN_LINEAR, HeadTransform, HeadTransformLinear, head_transform_of
from ..layers.hooks import remove_hooks
from ..layers.multihead import ConditionedMultiheadAttention, swap_to_conditioned
from ..layers.overrides import PostponedProjection, path_in
from .base import Method


class HeadOutputMethod(Method):
    """Base class of methods that apply a function to the outputs of each head of a site.

    The function is applied before the output projection. If an activation, a norm, a gate, or a residual is between the
    heads and the projection, it is applied before that. Subclasses implement :meth:`head_transform`. The spectra of the
    transformed outputs, and calibration (:func:`condattn.weights.calibrate.calibrate`), need no further code.
    """

    @abstractmethod
    def head_transform(self, site: AttentionSite) -> HeadTransform:
        """Return a new transform of the head outputs of ``site``, made with ``method=self``."""

    def check(self, site: AttentionSite) -> None:
        """Raise a ``ValueError`` unless the head outputs of ``site`` can be transformed, and are not already."""
        out = site.out
        if out is None:
            raise ValueError(f"{site}: its head outputs cannot be conditioned: {site.obstacle}; {leave_out(site)}")
        if (other := head_transform_of(site)) is not None:
            raise ValueError(
                f"{site}: its head outputs are conditioned already, by {other.method}; two methods cannot transform "
                "them: name one of them"
            )
        if is_copying(out.owner):
            raise ValueError(
                f"{site}: its head outputs cannot be conditioned: a {type(out.owner).__name__} of PEFT is around its "
                "output projection; condition the model before get_peft_model"
            )
        if isinstance(out.owner, nn.MultiheadAttention):
            check_can_swap(out.owner, ConditionedMultiheadAttention, site)
        if out.reader is not None:
            path_in(out.reader, inner(out.owner))
            check_can_swap(inner(out.owner), HeadTransformLinear, site)
        channels, heads = _channels(site, out), site.heads_of(out)
        if channels and channels % heads:
            raise ValueError(
                f"{site}: its head outputs cannot be conditioned: {heads} heads do not divide its {channels} channels; "
                f"{leave_out(site)}"
            )

    def apply(self, site: AttentionSite) -> None:
        """Insert the transform before the module that receives the head outputs."""
        out = site.out
        assert out is not None  # see check
        owner: Any = inner(out.owner)
        owner.head_transform = self.head_transform(site)
        owner.is_prepared = False
        if isinstance(owner, nn.MultiheadAttention):
            swap_to_conditioned(owner)
        elif not has_own_forward(owner) and type(owner) in PLAIN_LINEAR and owner is out.projection:
            swap_class(owner, HeadTransformLinear)
        else:
            owner.head_transform.keep(owner.register_forward_pre_hook(owner.head_transform))
            owner.__prepare_scriptable__ = refuse_scripting
        if out.reader is not None:
            PostponedProjection(out.reader, owner)

    def layers(self, site: AttentionSite) -> list[nn.Module]:
        """Return the module that receives the head outputs."""
        return [] if site.out is None else [site.out.owner]

    @classmethod
    def applied_to(cls, site: AttentionSite) -> HeadOutputMethod | None:
        """Return the method of this class that transforms the head outputs of ``site``, or None."""
        method: Any = getattr(head_transform_of(site), "method", None)
        return method if type(method) is cls else None

    @classmethod
    def remove(cls, site: AttentionSite) -> None:
        """Remove the transform, and restore the original class of the layer."""
        transform = head_transform_of(site)
        if site.out is None or transform is None:
            return  # removed with another site, which shares the layer
        owner: Any = inner(site.out.owner)
        del owner.head_transform, owner.is_prepared
        if isinstance(owner, ConditionedMultiheadAttention):
            owner.release()
        elif isinstance(owner, HeadTransformLinear):
            restore_class(owner)
        else:
            remove_hooks(owner, lambda hook: hook is transform)
            owner.__dict__.pop("__prepare_scriptable__", None)
        if site.out.reader is not None:
            PostponedProjection.detach(site.out.reader)


def _channels(site: AttentionSite, out: HeadOutputs) -> int | None:
    """Return the number of channels of head outputs along the axis, or None if the layers do not tell it."""
    if out.channels is not None:
        return out.channels.stop - out.channels.start
    for name in ("in_features", "in_channels"):
        if hasattr(out.projection, name):
            return getattr(out.projection, name)
    return len(site.v.weight) if site.v is not None else None
