"""Constant corrections W + C of trained weights, for any module that holds its weights as parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """Rows ``start:stop`` of a weight that get their own correction of size ``strength``."""

    start: int
    stop: int
    strength: float


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
            size = min(block.stop - block.start, weight.shape[1])
            columns[block.start : block.start + size] = torch.arange(size, device=weight.device)
        return columns

    @torch.no_grad()
    def compute(self, weight: Tensor) -> Tensor:
        """C of ``weight``, computed in float64 and returned in the dtype of ``weight``.

        Returns:
            The matrix C, (out features, in features), in the SVD form; its one entry per row, (out features,), in
            the identity form.
        """
        exact = weight.detach().double()
        constant = torch.zeros_like(exact) if self.svd else exact.new_zeros(exact.shape[0])
        for block in self.blocks:
            rows = exact[block.start : block.stop]
            scale = block.strength * (torch.linalg.matrix_norm(rows, 2) if self.relative else 1.0)
            if self.svd:
                u, _, vh = torch.linalg.svd(rows, full_matrices=False)
                constant[block.start : block.stop] = scale * (u @ vh)
            else:
                constant[block.start : block.start + min(rows.shape)] = scale
        return constant.to(weight.dtype)


class CorrectedModule(nn.Module):
    """Mixin: weights of the module enter its forward as W + C, C a constant that is never trained.

    The parameter W keeps its name. A C that depends on the weights is a persistent buffer, ``<parameter>_correction``:
    it is fixed by the first forward or by a checkpoint that has it. Until then it is NaN, so that re-initialising or
    loading weights in between is taken into account; loading a checkpoint without it starts over from the loaded
    weights. A C that does not depend on the weights is not stored. Run one forward before ``torch.export`` or
    ``torch.compile(fullgraph=True)``, which cannot trace the fixing.
    """

    corrections: Mapping[str, Correction] = MappingProxyType({})
    unsettled: frozenset[str] = frozenset()

    def add_correction(self, parameter: str, correction: Correction) -> None:
        """Correct the weight called ``parameter`` from now on."""
        self.corrections = {**self.corrections, parameter: correction}
        self._register(parameter)

    @torch.no_grad()
    def _register(self, parameter: str) -> None:
        """Make the buffers of a correction, on the weight's device: C, and where its entries are."""
        weight, correction = getattr(self, parameter), self.corrections[parameter]
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
        """W + C, or W itself if it has no correction: (out features, in features), differentiable in W."""
        weight = getattr(self, parameter)
        correction = self.corrections.get(parameter)
        if correction is None:
            return weight
        constant = getattr(self, f"{parameter}_correction")
        if parameter in self.unsettled:
            self._settle(parameter, constant)
        if correction.svd:
            return weight + constant
        columns = getattr(self, f"{parameter}_columns")
        return weight.scatter_add(1, columns[:, None], constant[:, None])

    @torch.no_grad()
    def merge_corrections(self) -> None:
        """Make W + C the weights and forget the corrections."""
        for parameter, correction in self.corrections.items():
            getattr(self, parameter).copy_(self.effective_weight(parameter))
            delattr(self, f"{parameter}_correction")
            if not correction.svd:
                delattr(self, f"{parameter}_columns")
        del self.corrections
        self.__dict__.pop("unsettled", None)

    def _settle(self, parameter: str, constant: Tensor) -> None:
        if constant.isnan().any():
            constant.copy_(self.corrections[parameter].compute(getattr(self, parameter)))
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
