"""Constant corrections W + C of trained weights, for any module that holds its weights as parameters.

All weights are treated as matrices (out features, in features), in whatever layout their layer stores them.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.site import Projection, indices
from ..attention.stored import check_writable
from ..kernels.private import is_watched_or_transformed, mark_static
from ..kernels.switch import is_compiling
from .class_swap import restore_parameters


@dataclass(frozen=True)
class Block:
    """Rows of a weight, as slices in order, that have one common correction of size ``strength``."""

    rows: tuple[slice, ...]
    strength: float

    @property
    def index(self) -> slice | list[int]:
        """The rows as one slice or list, to index a tensor with."""
        return self.rows[0] if len(self.rows) == 1 else indices(self.rows)


class Correction(ABC):
    """Base class: computes the constant C of one weight W (out features x in features). A layer may have several.

    Attributes:
        name: Distinguishes its buffers from those of other corrections of the same weight.
        method: The method that the correction belongs to, shown when the layer is printed.
    """

    name: str = ""
    method: object

    @property
    @abstractmethod
    def rows(self) -> frozenset[int]:
        """The rows in which C may be nonzero."""

    @property
    @abstractmethod
    def depends_on_weight(self) -> bool:
        """Whether C is a function of the weight, and must therefore be saved with it.

        If not, it is a function of the weight's shape alone, and computed for each device and dtype.
        """

    @abstractmethod
    def compute(self, weight: Tensor) -> Tensor:
        """Compute C for ``weight``, in its dtype.

        Returns:
            The matrix C, (out features, in features). If :meth:`columns` returns columns: the one entry of each row,
            (out features,).
        """

    def columns(self, weight: Tensor) -> Tensor | None:
        """Return the column of each row's entry, (out features,), if no row of C has more than one; else None."""
        return None

    def buffer(self, parameter: str) -> str:
        """Return the name of the buffer that holds C of the weight ``parameter``."""
        return f"{parameter}_correction" + (f"_{self.name}" if self.name else "")


@dataclass(frozen=True)
class BlockCorrection(Correction):
    """C is ``strength * scale * direction`` on each block of rows, and zero elsewhere.

    Attributes:
        blocks: The rows that are corrected; blocks do not overlap.
        relative: If True, the scale is the spectral norm of the block; if False, it is 1.
        svd: If True, the direction is U V^T of the block's thin SVD; if False, it is the rectangular identity.
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
        """Return the column of each row's entry, (out features,), 0 in rows without one; None in the SVD form."""
        if self.svd:
            return None
        columns = torch.zeros(weight.shape[0], dtype=torch.long, device=weight.device)
        for block in self.blocks:
            entries = torch.arange(columns[block.index].shape[0], device=weight.device)
            columns[block.index] = entries * (entries < weight.shape[1])
        return columns

    @torch.no_grad()
    def compute(self, weight: Tensor) -> Tensor:
        """Compute C for ``weight`` in float64, and return it in the dtype of ``weight``.

        Returns:
            The matrix C, (out features, in features), in the SVD form; the one entry of each row, (out features,), in
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
                diagonal = torch.arange(rows.shape[0], device=rows.device) < rows.shape[1]
                constant[block.index] = scale * diagonal.to(rows.dtype)
        return constant.to(weight.dtype)


def _gathered(weight: Tensor) -> Tensor:
    """Return a weight, gathered from all processes if it is sharded (FSDP2)."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def is_correction(name: str) -> bool:
    """Whether an entry of a state dict is a correction, by its name; see :meth:`Correction.buffer`."""
    return "_correction" in name.rpartition(".")[2]


class CorrectedModule(nn.Module):
    """Mixin for modules that use weights as W + C in their forward, where C is a constant that is never trained.

    The parameter W keeps its name. A C that depends on the weights is a persistent buffer, ``<parameter>_correction``.
    It is fixed by the first forward, by a checkpoint that contains it, or when an adapter (LoRA) is put around the
    module. Until then it is NaN, so that weights may still be initialised again or loaded. In a copy of the module it
    is fixed from the start, because a moving average would compute it from averaged weights: initialise weights before
    the module is copied (``nn.TransformerEncoder`` copies its layer). Loading a checkpoint without the buffer resets
    it, and C is computed from the loaded weights. A C that does not depend on the weights is not saved. Several
    corrections of one weight are added; each is computed from W alone.

    Run one forward before ``torch.jit.trace``, ``torch.export`` or ``torch.compile(fullgraph=True)``, which cannot
    trace how C is fixed.
    """

    transposed = False
    """Whether the weight is stored as (in features, out features)."""
    corrections: Mapping[str, tuple[Correction, ...]] = MappingProxyType({})
    """Name of a weight -> its corrections."""
    overridden: Mapping[str, Any] | None = None
    """The weights W that W + C replaces at the moment, see :class:`.overrides.ParameterOverride`."""
    unsettled: frozenset[str] = frozenset()
    """Names of the buffers whose corrections are not fixed yet."""
    abstract: frozenset[str] = frozenset()
    """Names of the buffers that were registered on the meta device, and not filled by ``load_state_dict``."""
    entries: Mapping[tuple, tuple[Tensor | None, Tensor | None]] | None = None
    """Name of a buffer, device and dtype -> C, unless it depends on the weight, and the columns of its entries.

    They are no buffers: a moving average of buffers would change the columns, and loaders leave them uninitialised.
    """

    def add_correction(self, parameter: str, correction: Correction) -> None:
        """Add a correction to the weight called ``parameter``."""
        before = self.corrections.get(parameter, ())
        self._register(parameter, correction)
        self.corrections = {**self.corrections, parameter: (*before, correction)}

    @property
    def corrected_by(self) -> list[object]:
        """The settings of the methods that correct weights of the module."""
        methods: list[object] = []
        for _, correction in self._all_corrections():
            if correction.method not in methods:  # a method with a dictionary as a setting has no hash
                methods.append(correction.method)
        return methods

    @torch.no_grad()
    def _register(self, parameter: str, correction: Correction) -> None:
        """Register the buffer of a correction that depends on the weight, on its device; one that fits is kept.

        Averages of buffers refer to those that there were when they began.
        """
        if not correction.depends_on_weight:
            return
        weight, name = self._matrix(_gathered(getattr(self, parameter))), correction.buffer(parameter)
        shape = weight.shape if correction.columns(weight) is None else weight.shape[:1]
        buffer = self._buffers.get(name)
        if buffer is not None and (buffer.shape, buffer.dtype, buffer.device) == (shape, weight.dtype, weight.device):
            buffer.fill_(torch.nan)
        else:
            self.register_buffer(name, weight.new_full(shape, torch.nan))
        self.unsettled = self.unsettled | {name}
        self.abstract = self.abstract | {name} if weight.is_meta else self.abstract - {name}

    @torch.no_grad()
    def _entries(self, parameter: str, correction: Correction, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """C of a weight, and the columns of its entries; see :meth:`Correction.compute` and :meth:`.columns`."""
        name = correction.buffer(parameter)
        key = name, matrix.device, matrix.dtype
        entries = self.entries or {}
        constant, columns = entries.get(key, (None, None))
        if key not in entries:
            like = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
            constant = None if correction.depends_on_weight else correction.compute(like)
            columns = correction.columns(like)
            if not (is_compiling() or torch.jit.is_tracing() or is_watched_or_transformed()):
                for tensor in filter(torch.is_tensor, (constant, columns)):
                    mark_static(tensor)
                self.entries = {**entries, key: (constant, columns)}
        return getattr(self, name) if constant is None else constant, columns

    def _apply(self, fn, recurse=True):
        """Register the buffers again where ``to_empty`` moves a weight away from the meta device."""
        abstract = {parameter for parameter in self.corrections if getattr(self, parameter).is_meta}
        super()._apply(fn, recurse)
        for parameter, correction in self._all_corrections():
            if parameter in abstract and not getattr(self, parameter).is_meta:
                self._register(parameter, correction)
        return self

    def _all_corrections(self) -> Iterator[tuple[str, Correction]]:
        """Yield the corrections, each with the name of its weight."""
        for parameter, corrections in self.corrections.items():
            for correction in corrections:
                yield parameter, correction

    def effective_weight(self, parameter: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """Return W + C, or W if it has no correction, in the layout of W and differentiable with respect to W.

        It is added in ``dtype``, by default that of W.
        """
        weight = (
            self.overridden[parameter] if self.overridden and parameter in self.overridden else getattr(self, parameter)
        )
        if dtype is not None:
            weight = weight.to(dtype)
        corrections = self.corrections.get(parameter, ())
        if not corrections:
            return weight
        matrix = self._matrix(weight)
        corrected = matrix
        for correction in corrections:
            if correction.buffer(parameter) in self.unsettled:
                self._settle(parameter, correction, matrix)
            constant, columns = self._entries(parameter, correction, matrix)
            if columns is None:
                corrected = corrected + constant.to(corrected.dtype)
            else:
                corrected = corrected.scatter_add(1, columns[:, None], constant[:, None].to(corrected.dtype))
        return corrected.T if self.transposed else corrected.view_as(weight)

    def release(self) -> None:
        """Restore the original class unless something else conditions the module."""
        raise NotImplementedError

    @torch.no_grad()
    def fold(self) -> None:
        """Make W + C the weights, remove the corrections, and restore the class unless something else conditions it."""
        restore_parameters(self)
        for parameter in self.corrections:
            getattr(self, parameter).copy_(self.effective_weight(parameter))
        self.drop_corrections()
        self.release()

    def drop_corrections(self, method: type | None = None) -> None:
        """Remove the corrections of one class of methods, or all of them; the weights stay W."""
        remaining: dict[str, tuple[Correction, ...]] = {}
        for parameter, correction in self._all_corrections():
            if method is not None and type(correction.method) is not method:
                remaining[parameter] = (*remaining.get(parameter, ()), correction)
                continue
            name = correction.buffer(parameter)
            self.unsettled, self.abstract = self.unsettled - {name}, self.abstract - {name}
            self.entries = {key: value for key, value in (self.entries or {}).items() if key[0] != name}
            if hasattr(self, name):
                delattr(self, name)
        if remaining:
            self.corrections = remaining
        else:
            for name in ("corrections", "unsettled", "abstract", "entries"):
                self.__dict__.pop(name, None)

    @torch.no_grad()
    def subtract_corrections(self, parameters: Collection[str]) -> None:
        """Make W - C the weights called ``parameters``, with C computed from W, so that W + C is what W was."""
        restore_parameters(self)
        corrections = [(name, correction) for name, correction in self._all_corrections() if name in parameters]
        for parameter, correction in corrections:
            if correction.depends_on_weight:
                name = correction.buffer(parameter)
                getattr(self, name).copy_(correction.compute(self._matrix(getattr(self, parameter))))
                self.unsettled = self.unsettled - {name}
        for parameter, correction in corrections:
            matrix = self._matrix(getattr(self, parameter))
            constant, columns = self._entries(parameter, correction, matrix)
            if columns is None:
                matrix.sub_(constant)
            else:
                matrix.scatter_add_(1, columns[:, None], -constant[:, None])

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight.flatten(1)

    def settle(self) -> None:
        """Fix the corrections that are not fixed yet, by computing them from the current weights."""
        for parameter, correction in self._all_corrections():
            weight = getattr(self, parameter)
            if correction.buffer(parameter) in self.unsettled and not weight.is_meta:
                self._settle(parameter, correction, self._matrix(weight))

    @torch.no_grad()
    def unsettle(self, parameter: str) -> None:
        """Compute the corrections of a weight anew in the next forward, because other values were written into it."""
        for correction in self.corrections.get(parameter, ()):
            if correction.depends_on_weight:
                getattr(self, correction.buffer(parameter)).fill_(torch.nan)
                self.unsettled = self.unsettled | {correction.buffer(parameter)}

    @torch.no_grad()
    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, in which the corrections are fixed as the module's own weights determine them."""
        fixed, state = {}, super().__getstate__()  # without what ``compile`` has compiled
        for parameter, correction in self._all_corrections():
            weight, name = getattr(self, parameter), correction.buffer(parameter)
            if name in self.unsettled and not weight.is_meta:
                constant = getattr(self, name)
                fixed[name] = correction.compute(self._matrix(weight)) if constant.isnan().any() else constant
        state.pop("entries", None)
        return {**state, "_buffers": {**self._buffers, **fixed}}

    def _settle(self, parameter: str, correction: Correction, matrix: Tensor) -> None:
        name = correction.buffer(parameter)
        if torch.jit.is_tracing():
            raise RuntimeError(
                "the correction of a weight is fixed by the first forward, which torch.jit.trace cannot record; run "
                "the model once before it is traced"
            )
        constant = getattr(self, name)
        if name in self.abstract and not constant.is_meta:
            raise RuntimeError(
                f"the correction {name} of a {type(self).__name__} was made on the meta device and not loaded with "
                "load_state_dict, so that its memory may never have been written; condition the model after its "
                "weights are loaded (after from_pretrained)"
            )
        if constant.isnan().any():
            constant.copy_(correction.compute(matrix))
        self.unsettled = self.unsettled - {name}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        for parameter, correction in list(self._all_corrections()):
            name = correction.buffer(parameter)
            key = prefix + name
            if correction.depends_on_weight and key in state_dict:
                self.unsettled = self.unsettled | {name}  # the checkpoint may have been saved before the first forward
                self.abstract = self.abstract - {name}
            elif prefix + parameter in state_dict:
                # Compute C from the loaded weight. This also covers a module that was built on the meta device.
                self._register(parameter, correction)
                if key in missing:
                    missing.remove(key)


def corrections_of(projection: Projection) -> list[Correction]:
    """Return the corrections that change rows of a projection."""
    corrections = getattr(projection.owner, "corrections", {}).get(projection.parameter, ())
    if not corrections:
        return []
    rows = set(indices(projection.rows))
    return [correction for correction in corrections if rows & correction.rows]


def corrected_modules(model: nn.Module) -> list[CorrectedModule]:
    """Return the modules in ``model`` that have corrections."""
    return [module for module in model.modules() if isinstance(module, CorrectedModule) and module.corrections]


def check_weights_of(model: nn.Module, corrected: Iterable[CorrectedModule]) -> None:
    """Raise a one-line ``ValueError`` unless the corrected weights of modules in ``model`` can be written."""
    check_writable(model, [(module, parameter) for module in corrected for parameter in module.corrections])


def subtract_corrections(model: nn.Module, weights: Collection[str]) -> int:
    """Call :meth:`CorrectedModule.subtract_corrections` on those of ``weights``, names in ``model``, with corrections.

    Returns the number of these weights.

    Raises:
        ValueError: If a weight cannot be written, see :func:`check_weights_of`; in this case nothing is changed.
    """
    corrected = corrected_modules(model)
    check_weights_of(model, corrected)
    names = {module: name for name, module in model.named_modules()}
    number = 0
    for module in corrected:
        prefix = f"{names[module]}." if names[module] else ""
        parameters = [parameter for parameter in module.corrections if prefix + parameter in weights]
        module.subtract_corrections(parameters)
        number += len(parameters)
    return number
