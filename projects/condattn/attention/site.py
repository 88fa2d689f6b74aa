"""The description of an attention site: its projections of queries, keys and values, and its head outputs."""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from .classes import qualified_name
from .stored import check_stored


@dataclass(frozen=True)
class Projection:
    """One linear map of a site: some rows of a weight matrix.

    Attributes:
        owner: The module that evaluates the map: an ``nn.Linear``, a convolution of size 1, or the attention module
            itself if it calls its projections functionally, as ``nn.MultiheadAttention`` does. If adapters wrap a
            layer, it is the wrapped layer.
        parameter: Name of the weight in ``owner``.
        rows: The rows of that matrix that belong to the map, head after head, as slices.
        num_heads: Number of heads of the map, which is smaller than that of the site if groups of query heads share
            keys and values; None: the same as the site.
        reader: The module whose forward uses the weight of ``owner`` without calling ``owner``, or None.
    """

    owner: nn.Module
    parameter: str
    rows: tuple[slice, ...]
    num_heads: int | None = None
    reader: nn.Module | None = None

    @property
    def weight(self) -> Tensor:
        """The rows of the trained weight, without any correction: (out features of the map, in features)."""
        matrix = as_matrix(self.owner, getattr(self.owner, self.parameter))
        return matrix[self.rows[0]] if len(self.rows) == 1 else matrix[indices(self.rows)]

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Write the rows of the trained weight in place; ``weight`` has the shape of :attr:`weight`, on any device.

        Raises:
            ValueError: If the weight is computed in every forward, and not stored.
        """
        check_stored(self.owner, self.parameter, "set_weight")
        matrix = as_matrix(self.owner, getattr(self.owner, self.parameter))
        matrix[indices(self.rows)] = weight.to(matrix)


@dataclass(frozen=True)
class HeadOutputs:
    """Where the outputs of all heads of a site, side by side in one tensor, enter a module.

    Attributes:
        owner: The module whose first input they are; the attention module itself if it projects them functionally. If
            an adapter wraps a layer, it is the adapter.
        projection: The output projection that they reach, either here or after an activation, a norm or a gate. If
            adapters wrap it, it is the wrapped layer. The owner itself if there is no output projection.
        axis: The axis of that input along which the channels of the heads lie.
        channels: The channels that are head outputs, if the input also has other channels; None: all channels.
        num_heads: Number of heads along the axis; None: the same as the site. 1 if the heads have an axis of their own.
        interleaved: Whether channel c belongs to head c modulo the number of heads, instead of head c // head size.
        reader: The module whose forward uses weight and bias of ``owner`` without calling it; None if ``owner`` is
            called. ``owner`` must be a linear layer with as many outputs as inputs, and ``reader`` may only rearrange
            tokens after it.
    """

    owner: nn.Module
    projection: nn.Module
    axis: int = -1
    channels: slice | None = None
    num_heads: int | None = None
    interleaved: bool = False
    reader: nn.Module | None = None


@dataclass(frozen=True)
class Place:
    """A module of a model at which a method acts.

    Attributes:
        name: Qualified name of ``module`` in the model that was searched; '' for the model itself.
        module: The module.
    """

    name: str
    module: nn.Module

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'} ({type(self.module).__name__})"


def is_within(name: str, module: str) -> bool:
    """Whether the module called ``name`` is the one called ``module``, or in it; '' is the whole model."""
    return not module or name == module or name.startswith(f"{module}.")


@dataclass(frozen=True)
class AttentionSite(Place):
    """Where one attention module, the host, projects q, k and v, and where its head outputs go.

    Attributes:
        name: See :class:`Place`.
        module: The host module.
        num_heads: Number of heads.
        q: The query projection, or None if the queries are made elsewhere.
        k: The key projection, or None.
        v: The value projection, or None.
        out: Where the head outputs enter a module, or None if no module receives them.
        cross_covariance: Whether attention is between the channels of a head (XCiT, DaViT) instead of tokens.
        obstacle: Why a part is None; completes the sentence "cannot be conditioned: ...".
    """

    num_heads: int
    q: Projection | None = None
    k: Projection | None = None
    v: Projection | None = None
    out: HeadOutputs | None = None
    cross_covariance: bool = False
    obstacle: str = ""

    @property
    def projections(self) -> dict[str, Projection]:
        """The projections of queries, keys and values that the site has, by their names 'q', 'k' and 'v'."""
        named = {"q": self.q, "k": self.k, "v": self.v}
        return {name: projection for name, projection in named.items() if projection is not None}

    def heads_of(self, part: Projection | HeadOutputs) -> int:
        """Return the number of heads of one of the site's projections, or of its head outputs."""
        return part.num_heads or self.num_heads


def indices(rows: tuple[slice, ...]) -> list[int]:
    """Return the row numbers that the slices select, in order."""
    return [row for part in rows for row in range(part.start, part.stop)]


def is_transposed(owner: nn.Module) -> bool:
    """Return whether ``owner`` stores its weight as (in features, out features): transformers' ``Conv1D`` (GPT-2)."""
    return any(qualified_name(cls) == "transformers.pytorch_utils.Conv1D" for cls in type(owner).__mro__)


def is_convolution(owner: nn.Module) -> TypeGuard[nn.modules.conv._ConvNd]:
    """Return whether ``owner`` is a convolution in any number of dimensions; its channels lie along axis 1."""
    return isinstance(owner, nn.modules.conv._ConvNd)


def as_matrix(owner: nn.Module, weight: Tensor) -> Tensor:
    """Return ``weight`` of ``owner`` as a matrix (out features, in features)."""
    return weight.T if is_transposed(owner) else weight.flatten(1)
