"""Load pretrained weights in any known naming scheme into a model, and report what happened to each weight."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layers.correction import check_weights_of, corrected_modules, is_correction, subtract_corrections
from ..wording import some
from .files import read_file, weights_of
from .names import recognize, translate
from .resize import resize_bias_table, resize_positions

# Matches weights of transformer blocks, and of the layers between two stages.
BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers|stages|cls_attn_blocks)\.[0-9]+\.")
POSITIONS = re.compile(r"(?:^|\.)(?:absolute_)?pos_embed$")


class ConversionError(ValueError):
    """Raised if weights do not fit a model; the message says why, in one line."""


@dataclass
class LoadReport:
    """What happened to the weights of a file.

    Attributes:
        path: The file, and its entry that held the weights.
        recognized: Its format, as text.
        loaded: Names, in the model, of the weights that were loaded.
        interpolated: The names of those that were interpolated, each with the old and the new size.
        left_out: Names, in the file, of weights that have no counterpart in the model.
        missing: Names, in the model, of weights that are not in the file and keep their values.
    """

    path: str
    recognized: str
    loaded: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.recognized}; {len(self.loaded)} weights loaded"]
        for names, what in (
            (self.interpolated, "interpolated"),
            (self.left_out, "left out"),
            (self.missing, "not in the file, which keep their values"),
        ):
            if names:
                parts.append(f"{len(names)} {what} ({some(names)})")
        return "; ".join(parts)


def load_pretrained(
    model: nn.Module,
    path: str | Path,
    load: str = "raw",
    unsafe: bool = False,
    known: Collection[str] = (),
    prefix: str = "",
) -> LoadReport:
    """Load the weights of a file into ``model``, in place.

    The file may have the names of another release of the same family, see :mod:`condattn.weights.names`, and position
    tables for another image or window size. Buffers that the model computes itself are not loaded.

    Args:
        model: A backbone, conditioned or not.
        path: The file: .pth, .pt, .bin or .safetensors. Dictionaries in which training scripts wrap weights are
            unwrapped.
        load: 'raw' loads the weights as W. 'effective', for weights trained without spectral correction, loads W - C,
            so that W + C is the weight of the file. The function is preserved, and only the centre of the weight decay
            moves, to C.
        unsafe: See :func:`condattn.weights.files.read_file`.
        known: Names of weights that the model could have but does not (pruned layers); they are not reported as left
            out.
        prefix: Only weights whose names begin with it are loaded, without it.

    Raises:
        BadFileError: If the file cannot be read, or holds no weights, or none with the prefix.
        ConversionError: If no weight fits, a block of the model is not in the file, a block of the file is not in the
            model, shapes differ, or values are not finite; the model is unchanged in these cases.
        ValueError: If ``load`` is neither 'raw' nor 'effective', or is 'effective' and a corrected weight is computed
            (pruned), or is that of another layer as well.
    """
    weights, beside, where = weights_of(read_file(path, unsafe), path, prefix)
    report = load_weights(model, weights, str(path), load, known)
    report.path = where
    report.left_out += beside
    return report


@torch.no_grad()
def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, load: str = "raw", known: Collection[str] = ()
) -> LoadReport:
    """Load weights that come from ``source`` into ``model``; see :func:`load_pretrained`."""
    if load not in ("raw", "effective"):
        raise ValueError(f"load is {load!r}; expected 'raw' or 'effective'")
    if load == "effective":
        check_weights_of(model, corrected_modules(model))
    fitted, report = fit(weights, model, source, known)
    model.load_state_dict(fitted, strict=False)
    if load == "effective":
        subtract_corrections(model, fitted)
    return report


def fit(
    weights: Mapping[str, Tensor], model: nn.Module, path: str, known: Collection[str] = ()
) -> tuple[dict[str, Tensor], LoadReport]:
    """Return the weights with the names and sizes of the model, and a report; see :func:`load_pretrained`."""
    expected = model.state_dict()
    source, target = recognize(weights), recognize(expected)
    translated, unplaced = dict(weights), []
    if source and target and source.family == target.family:
        translated, unplaced = translate(weights, source, target)
    report = LoadReport(path, str(source) if source else "the model's own names")
    places = {name for name in translated if name in expected}
    if not places:
        raise ConversionError(
            f"no weight of {path} has a place in the model: the file ({source or 'an unknown format'}) has "
            f"{some(weights)}; the model ({target or 'an unknown format'}) has {some(expected)}"
        )
    parameters = dict(model.named_parameters())
    fitted = {}
    for name in expected:
        if name in places and (name in parameters or not _is_computed(name)):
            fitted[name] = _fit_one(translated[name], expected[name], name, model, path, report)
    report.loaded = list(fitted)
    report.missing = [name for name in parameters if name not in fitted]
    if gaps := block_weights(report.missing):
        blocks = block_weights(weights) or list(weights)
        raise ConversionError(f"{path} is of another model: it has no {some(gaps)}; it has {some(blocks)}")
    report.left_out = [name for name in (*unplaced, *translated) if name not in expected and name not in known]
    if strange := block_weights(report.left_out):
        raise ConversionError(f"{path} is of another model: the model has no {some(strange)}")
    report.left_out = [name for name in report.left_out if not _is_computed(name)]
    return fitted, report


def block_weights(names: Iterable[str]) -> list[str]:
    """Return those names that are of weights in transformer blocks or between stages, without which these do not work.

    Buffers that a model computes itself are none.
    """
    return [name for name in names if BLOCK.search(name) and not _is_computed(name)]


def _is_computed(name: str) -> bool:
    return name.endswith(("relative_position_index", "attn_mask"))


def _fit_one(value: Tensor, expected: Tensor, name: str, model: nn.Module, path: str, report: LoadReport) -> Tensor:
    if value.shape != expected.shape:
        old, new = (" x ".join(map(str, tensor.shape)) for tensor in (value, expected))
        try:
            value = _resized(value, expected, name, model)
        except ValueError as error:
            reason = f" ({error})" if str(error) else ""
            raise ConversionError(
                f"{path} is of another model: {name} is {old} there, {new} in the model{reason}"
            ) from error
        report.interpolated.append(f"{name} from {old} to {new}")
    damaged = value.is_floating_point() and not value.sum(dtype=torch.float32).isfinite() and not value.isfinite().all()
    if damaged and not (is_correction(name) and value.isnan().all()):  # a correction that is not fixed yet is NaN
        raise ConversionError(f"{path} is damaged: {name} has values that are not finite")
    return value


def _resized(value: Tensor, expected: Tensor, name: str, model: nn.Module) -> Tensor:
    if value.ndim != expected.ndim:
        raise ValueError("")
    if name.endswith("relative_position_bias_table") and value.shape[1] == expected.shape[1]:
        return resize_bias_table(value, len(expected))
    if POSITIONS.search(name) and value.ndim == 3 and value.shape[2] == expected.shape[2]:
        return resize_positions(value, expected.shape[1], _grid(model), getattr(model, "num_prefix_tokens", None))
    raise ValueError("")


def _grid(model: nn.Module) -> tuple[int, int] | None:
    """Return the rows and columns of patches, if a model of timm or mmseg reports them."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None and isinstance(getattr(model, "img_size", None), tuple) and hasattr(model, "patch_size"):
        grid = tuple(side // model.patch_size for side in model.img_size)
    return grid
