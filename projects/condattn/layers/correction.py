"""Constant corrections W + C of trained weights, for any module that holds its weights as parameters.

Weights count as matrices (out features, in features), whatever the layout in which their layer keeps them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..attention.site import Projection, indices


@dataclass(frozen=True)
class Block:
    """Rows of a weight, as slices in their order, that get their own correction of size ``strength``."""

    rows: tuple[slice, ...]
    strength: float

    @property
    def index(self) -> slice | list[int]:
        """The rows as one index."""
        return self.rows[0] if len(self.rows) == 1 else indices(self.rows)


class Correction(ABC):
    """How the constant C of one weight W (out features x in features) is made; a layer may have several.

    Attributes:
        name: What tells its buffers from those of other corrections of the same weight.
        method: The settings of the method that the correction is of, for the printed layer.
    """

    name: str = ""
    method: object

    @property
    @abstractmethod
    def rows(self) -> frozenset[int]:
        """The rows in which C may be other than zero."""

    @property
    @abstractmethod
    def depends_on_weight(self) -> bool:
        """Whether C is a function of the weight and so has to be kept with it."""

    @abstractmethod
    def compute(self, weight: Tensor) -> Tensor:
        """C of ``weight``, in its dtype.

        Returns:
            The matrix C, (out features, in features); or, where :meth:`columns` gives columns, its one entry per row,
            (out features,).
        """

    def columns(self, weight: Tensor) -> Tensor | None:
        """Column of each row's entry, (out features,), where every row of C has at most one; else None."""
        return None

    def buffer(self, parameter: str) -> str:
        """The name of the buffer with C of the weight called ``parameter``."""
        return f"{parameter}_correction" + (f"_{self.name}" if self.name else "")

    def columns_buffer(self, parameter: str) -> str:
        """The name of the buffer with the columns, if there are columns."""
        return f"{parameter}_columns" + (f"_{self.name}" if self.name else "")


@dataclass(frozen=True)
class BlockCorrection(Correction):
    """On each block of rows C is ``strength * scale * direction``; elsewhere it is zero.

    Attributes:
        blocks: The rows that are corrected; blocks do not overlap.
        relative: The scale is the spectral norm of the block if True, 1 if False.
        svd: The direction is U V^T of the block's thin SVD if True; the rectangular identity if False.
    """

    blocks: tuple[Block, ...]
    relative: bool
    svd: bool
    method: object = None

    @property
    def rows(self) -> frozenset[int]:
        """The rows of all blocks."""
        return frozenset(row for block in self.blocks for row in indices(block.rows))

    @property
    def depends_on_weight(self) -> bool:
        """Whether the scale or the direction is a function of the weight."""
        return self.relative or self.svd

    def columns(self, weight: Tensor) -> Tensor | None:
        """Column of each row's entry in the identity form: (out features,), 0 in rows that have none."""
        if self.svd:
            return None
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
    Several corrections of one weight add up; each is made of W alone.
    Run one forward before ``torch.export`` or ``torch.compile(fullgraph=True)``, which cannot trace the fixing.
    """

    transposed = False
    """Whether the weight is kept as (in features, out features)."""
    corrections: Mapping[str, tuple[Correction, ...]] = MappingProxyType({})
    """Name of a weight -> its corrections."""
    overridden: Mapping[str, Tensor] | None = None
    """The weights W in whose place W + C stands at the moment, see :class:`.overrides.ParameterOverride`."""
    unsettled: frozenset[str] = frozenset()
    """The buffers of corrections that are not fixed yet."""

    def add_correction(self, parameter: str, correction: Correction) -> None:
        """Correct the weight called ``parameter`` from now on."""
        before = self.corrections.get(parameter, ())
        self.corrections = {**self.corrections, parameter: (*before, correction)}
        self._register(parameter, correction)

    @property
    def corrected_by(self) -> list[object]:
        """The settings of the methods that correct weights of the module."""
        return list(dict.fromkeys(correction.method for _, correction in self._all_corrections()))

    @torch.no_grad()
    def _register(self, parameter: str, correction: Correction) -> None:
        """Make the buffers of a correction, on the weight's device: C, and where its entries are."""
        weight = self._matrix(_whole(getattr(self, parameter)))
        columns = correction.columns(weight)
        name = correction.buffer(parameter)
        if correction.depends_on_weight:
            constant = weight.new_full(weight.shape if columns is None else weight.shape[:1], torch.nan)
            self.unsettled |= {name}
        else:
            constant = correction.compute(weight)
        self.register_buffer(name, constant, persistent=correction.depends_on_weight)
        if columns is not None:
            self.register_buffer(correction.columns_buffer(parameter), columns, persistent=False)

    def _all_corrections(self) -> Iterator[tuple[str, Correction]]:
        """The corrections, each with the name of its weight."""
        for parameter, corrections in self.corrections.items():
            for correction in corrections:
                yield parameter, correction

    def effective_weight(self, parameter: str = "weight") -> Tensor:
        """W + C, or W itself if it has no correction: in the layout of W, differentiable in W."""
        weight = (
            self.overridden[parameter] if self.overridden and parameter in self.overridden else getattr(self, parameter)
        )
        corrections = self.corrections.get(parameter, ())
        if not corrections:
            return weight
        matrix = self._matrix(weight)
        corrected = matrix
        for correction in corrections:
            name = correction.buffer(parameter)
            if name in self.unsettled:
                self._settle(parameter, correction, matrix)
            constant, columns = getattr(self, name), getattr(self, correction.columns_buffer(parameter), None)
            if columns is None:
                corrected = corrected + constant
            else:
                corrected = corrected.scatter_add(1, columns[:, None], constant[:, None])
        return corrected.T if self.transposed else corrected.view_as(weight)

    def release(self) -> None:
        """Become the plain module again, unless something else conditions it."""
        raise NotImplementedError

    @torch.no_grad()
    def fold(self) -> None:
        """Make W + C the weights and forget the corrections; if nothing else conditions it, become the plain module."""
        for parameter in self.corrections:
            getattr(self, parameter).copy_(self.effective_weight(parameter))
        self.drop_corrections()
        self.release()

    def drop_corrections(self, method: type | None = None) -> None:
        """Forget the corrections of a class of methods, or all of them; the weights stay W."""
        remaining: dict[str, tuple[Correction, ...]] = {}
        for parameter, correction in self._all_corrections():
            if method is not None and type(correction.method) is not method:
                remaining[parameter] = (*remaining.get(parameter, ()), correction)
                continue
            self.unsettled -= {correction.buffer(parameter)}
            for name in (correction.buffer(parameter), correction.columns_buffer(parameter)):
                if hasattr(self, name):
                    delattr(self, name)
        if remaining:
            self.corrections = remaining
        else:
            del self.corrections
            self.__dict__.pop("unsettled", None)

    @torch.no_grad()
    def subtract_corrections(self) -> None:
        """Make W - C the weights, C that of W, so that W itself is the effective weight from now on."""
        corrections = list(self._all_corrections())
        for parameter, correction in corrections:
            if correction.depends_on_weight:
                name = correction.buffer(parameter)
                getattr(self, name).copy_(correction.compute(self._matrix(getattr(self, parameter))))
                self.unsettled -= {name}
        for parameter, correction in corrections:
            matrix, constant = self._matrix(getattr(self, parameter)), getattr(self, correction.buffer(parameter))
            columns = getattr(self, correction.columns_buffer(parameter), None)
            if columns is None:
                matrix.sub_(constant)
            else:
                matrix.scatter_add_(1, columns[:, None], -constant[:, None])

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight.flatten(1)

    def settle(self) -> None:
        """Fix the corrections that are not yet, by the weights as they are."""
        for parameter, correction in self._all_corrections():
            weight = getattr(self, parameter)
            if correction.buffer(parameter) in self.unsettled and not weight.is_meta:
                self._settle(parameter, correction, self._matrix(weight))

    def _settle(self, parameter: str, correction: Correction, matrix: Tensor) -> None:
        constant = getattr(self, correction.buffer(parameter))
        if constant.isnan().any():
            constant.copy_(correction.compute(matrix))
        self.unsettled -= {correction.buffer(parameter)}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        for parameter, correction in list(self._all_corrections()):
            name = correction.buffer(parameter)
            key = prefix + name
            if correction.depends_on_weight and key in state_dict:
                self.unsettled |= {name}  # the checkpoint may be older than the first forward
            elif prefix + parameter in state_dict:
                # From the loaded weight; also where the module was built on the meta device.
                self._register(parameter, correction)
                if key in missing:
                    missing.remove(key)


def corrections_of(projection: Projection) -> list[Correction]:
    """The corrections of the rows of a projection."""
    rows = set(indices(projection.rows))
    corrections = getattr(projection.owner, "corrections", {}).get(projection.parameter, ())
    return [correction for correction in corrections if rows & correction.rows]


def subtract_corrections(model: nn.Module) -> int:
    """:meth:`CorrectedModule.subtract_corrections` of all corrected weights in ``model``; returns their number."""
    corrected = [module for module in model.modules() if isinstance(module, CorrectedModule) and module.corrections]
    for module in corrected:
        module.subtract_corrections()
    return sum(len(module.corrections) for module in corrected)
