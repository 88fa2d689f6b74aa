"""Constant corrections W + C of trained weights, for any module that holds its weights as parameters.

Weights count as matrices (out features, in features), whatever the layout in which their layer keeps them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..attention.site import indices


@dataclass(frozen=True)
class Block:
    """Rows of a weight, as slices in their order, that get their own correction of size ``strength``."""

    rows: tuple[slice, ...]
    strength: float

    @property
    def index(self) -> slice | list[int]:
        """The rows as one index."""
        return self.rows[0] if len(self.rows) == 1 else indices(self.rows)


@dataclass(frozen=True)
class Correction:
    """How the constant C of one weight W (out features x in features) is made.

    On each block of rows C is ``strength * scale * direction``; elsewhere it is zero.

    Attributes:
        blocks: The rows that are corrected; blocks do not overlap.
        relative: The scale is the spectral norm of the block if True, 1 if False.
        svd: The direction is U V^T of the block's thin SVD if True; the rectangular identity if False.
    """

    blocks: tuple[Block, ...]
    relative: bool
    svd: bool

    @property
    def depends_on_weight(self) -> bool:
        """Whether C is a function of the weight and so has to be kept with it."""
        return self.relative or self.svd

    def columns(self, weight: Tensor) -> Tensor:
        """Column of each row's entry in the identity form: (out features,), 0 in rows that have none."""
        columns = torch.zeros(weight.shape[0], dtype=torch.long, device=weight.device)
        for block in self.blocks:
            entries = torch.arange(len(columns[block.index]), device=weight.device)
            columns[block.index] = entries * (entries < weight.shape[1])
        return columns

    @torch.no_grad()
    def compute(self, weight: Tensor) -> Tensor:
        """C of ``weight``, computed in float64 and returned in the dtype of ``weight``.

        Returns:
            The matrix C, (out features, in features), in the SVD form; its one entry per row, (out features,), in
            the identity form.
        """
        exact = weight.detach().double() if self.depends_on_weight else weight.detach()
        constant = torch.zeros_like(exact) if self.svd else exact.new_zeros(exact.shape[0])
        for block in self.blocks:
            rows = exact[block.index]
            scale = block.strength * (torch.linalg.matrix_norm(rows, 2) if self.relative else 1.0)
            if self.svd:
                u, _, vh = torch.linalg.svd(rows, full_matrices=False)
                constant[block.index] = scale * (u @ vh)
            else:
                diagonal = torch.arange(len(rows), device=rows.device) < rows.shape[1]
                constant[block.index] = scale * diagonal.to(rows.dtype)
        return constant.to(weight.dtype)


def _whole(weight: Tensor) -> Tensor:
    """A weight, gathered if it is sharded over processes (FSDP2)."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


class CorrectedModule(nn.Module):
    """Mixin: weights of the module enter its forward as W + C, C a constant that is never trained.

    The parameter W keeps its name. A C that depends on the weights is a persistent buffer, ``<parameter>_correction``:
    it is fixed by the first forward, by a checkpoint that has it, or when an adapter (LoRA) is put around the module.
    Until then it is NaN, so that re-initialising or loading weights in between is taken into account; loading a
    checkpoint without it starts over from the loaded weights. A C that does not depend on the weights is not stored.
    Run one forward before ``torch.export`` or ``torch.compile(fullgraph=True)``, which cannot trace the fixing.
    """

    transposed = False
    """Whether the weight is kept as (in features, out features)."""
    corrections: Mapping[str, Correction] = MappingProxyType({})
    overridden: Mapping[str, Tensor] | None = None
    """The weights W in whose place W + C stands at the moment, see :class:`.overrides.ParameterOverride`."""
    unsettled: frozenset[str] = frozenset()

    def add_correction(self, parameter: str, correction: Correction) -> None:
        """Correct the weight called ``parameter`` from now on."""
        self.corrections = {**self.corrections, parameter: correction}
        self._register(parameter)

    @torch.no_grad()
    def _register(self, parameter: str) -> None:
        """Make the buffers of a correction, on the weight's device: C, and where its entries are."""
        weight, correction = self._matrix(_whole(getattr(self, parameter))), self.corrections[parameter]
        if correction.depends_on_weight:
            shape = weight.shape if correction.svd else weight.shape[:1]
            constant = weight.new_full(shape, torch.nan)
            self.unsettled |= {parameter}
        else:
            constant = correction.compute(weight)
        self.register_buffer(f"{parameter}_correction", constant, persistent=correction.depends_on_weight)
        if not correction.svd:
            self.register_buffer(f"{parameter}_columns", correction.columns(weight), persistent=False)

    def effective_weight(self, parameter: str = "weight") -> Tensor:
        """W + C, or W itself if it has no correction: in the layout of W, differentiable in W."""
        weight = (
            self.overridden[parameter] if self.overridden and parameter in self.overridden else getattr(self, parameter)
        )
        matrix = self._matrix(weight)
        correction = self.corrections.get(parameter)
        if correction is None:
            return weight
        constant = getattr(self, f"{parameter}_correction")
        if parameter in self.unsettled:
            self._settle(parameter, matrix, constant)
        if correction.svd:
            corrected = matrix + constant
        else:
            corrected = matrix.scatter_add(1, getattr(self, f"{parameter}_columns")[:, None], constant[:, None])
        return corrected.T if self.transposed else corrected.view_as(weight)

    def fold(self) -> None:
        """Merge the corrections into the weights and, if nothing else conditions it, become the plain module again."""
        raise NotImplementedError

    @torch.no_grad()
    def merge_corrections(self) -> None:
        """Make W + C the weights and forget the corrections."""
        for parameter in self.corrections:
            getattr(self, parameter).copy_(self.effective_weight(parameter))
        self.drop_corrections()

    def drop_corrections(self) -> None:
        """Forget the corrections; the weights stay W."""
        for parameter, correction in self.corrections.items():
            delattr(self, f"{parameter}_correction")
            if not correction.svd:
                delattr(self, f"{parameter}_columns")
        del self.corrections
        self.__dict__.pop("unsettled", None)

    @torch.no_grad()
    def subtract_corrections(self) -> None:
        """Make W - C the weights, C that of W, so that W itself is the effective weight from now on."""
        for parameter, correction in self.corrections.items():
            weight = getattr(self, parameter)
            constant = getattr(self, f"{parameter}_correction")
            matrix = self._matrix(weight)
            if correction.depends_on_weight:
                constant.copy_(correction.compute(matrix))
                self.unsettled -= {parameter}
            if correction.svd:
                matrix.sub_(constant)
            else:
                matrix.scatter_add_(1, getattr(self, f"{parameter}_columns")[:, None], -constant[:, None])

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight.flatten(1)

    def settle(self) -> None:
        """Fix the corrections that are not yet, by the weights as they are."""
        for parameter in self.unsettled:
            weight = getattr(self, parameter)
            if not weight.is_meta:
                self._settle(parameter, self._matrix(weight), getattr(self, f"{parameter}_correction"))

    def _settle(self, parameter: str, matrix: Tensor, constant: Tensor) -> None:
        if constant.isnan().any():
            constant.copy_(self.corrections[parameter].compute(matrix))
        self.unsettled -= {parameter}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        for parameter, correction in self.corrections.items():
            key = f"{prefix}{parameter}_correction"
            if correction.depends_on_weight and key in state_dict:
                self.unsettled |= {parameter}  # the checkpoint may be older than the first forward
            elif prefix + parameter in state_dict:
                # From the loaded weight; also where the module was built on the meta device.
                self._register(parameter)
                if key in missing:
                    missing.remove(key)


def subtract_corrections(model: nn.Module) -> None:
    """:meth:`CorrectedModule.subtract_corrections` of all corrected weights in ``model``."""
    for module in model.modules():
        if isinstance(module, CorrectedModule):
            module.subtract_corrections()
