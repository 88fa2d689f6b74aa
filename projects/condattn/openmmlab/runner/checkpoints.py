"""Read checkpoints, and refuse missing, unreadable or unfitting ones before a run starts."""

import copy
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from torch import Tensor, nn

from ...weights.files import BadFileError, describe_wrong_hash, read_file, weights_of
from ...wording import some
from ..errors import UserError
from ..models.base import pretrained_entry, refuse_initial_weights, without_pretrained
from ..models.loading import difference_from
from ..models.settings import setting_path
from ..models.wrapping import unwrapped

HUBS = {
    "torchvision://": get_torchvision_models,
    "modelzoo://": get_torchvision_models,
    "open-mmlab://": get_external_models,
    "openmmlab://": get_external_models,
    "mmcls://": get_mmcls_models,
}
"""URL prefix of a collection of weights -> function that returns mmengine's table of their addresses."""


class MissingCheckpointError(UserError, FileNotFoundError):
    """There is no such checkpoint; callers of mmengine's reader expect a ``FileNotFoundError``."""


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of all tools that load a checkpoint."""
    parser.add_argument(
        "--other-conditioning",
        action="store_true",
        help="load a checkpoint although the attention of its model was conditioned otherwise",
    )
    add_unsafe_argument(parser)


def add_unsafe_argument(parser: ArgumentParser) -> None:
    """Add the argument of all tools that read a file of weights."""
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="read a checkpoint that holds more than weights, which executes the code in it",
    )


def read_checkpoint(path: str, unsafe: bool = False) -> dict:
    """Read a checkpoint from a file or a URL to the CPU.

    Args:
        path: The file, URL, or name in a collection (``HUBS``).
        unsafe: Whether code in the file may be executed.

    Raises:
        UserError: If there is no such file, or it is not a checkpoint, truncated or not safe.
    """
    try:
        checkpoint = read_file(_address(path), unsafe)
    except BadFileError as error:
        failure = MissingCheckpointError if isinstance(error, FileNotFoundError) else UserError
        raise failure(f"cannot read the checkpoint {path}: {error}") from error
    if path.startswith("mmcls://"):  # classifiers; detectors and segmenters use their backbone
        weights, _, _ = weights_of(checkpoint, path)
        checkpoint = {"state_dict": weights}
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no checkpoint: expected a dictionary of weights, got {type(checkpoint).__name__}")
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        checkpoint = {"state_dict": checkpoint}
    _check_form(checkpoint, path)
    return checkpoint


def _check_form(checkpoint: dict, path: str) -> None:
    """Check that ``state_dict`` is a dictionary with text as keys, and that ``meta`` is a dictionary."""
    weights = checkpoint.get("state_dict", checkpoint)
    if not isinstance(weights, Mapping):
        raise UserError(f"{path}: expected state_dict to be a dictionary of weights, found a {type(weights).__name__}")
    if strange := [key for key in weights if not isinstance(key, str)]:
        kind = type(strange[0]).__name__
        raise UserError(f"{path}: expected weights with names, found the key {strange[0]!r}, of type {kind}")
    if not isinstance(checkpoint.get("meta", {}), Mapping):
        raise UserError(f"{path}: expected meta to be a dictionary, found a {type(checkpoint['meta']).__name__}")


def read_safely(unsafe: bool = False) -> None:
    """Make mmengine's runner and ``init_cfg`` use :func:`read_checkpoint`, as mmengine's own reader executes code.

    Args:
        unsafe: Whether code in a file may be executed.
    """

    def load_from_file(path: str, map_location: object = None) -> dict:
        return read_checkpoint(path, unsafe)

    CheckpointLoader.register_scheme(("", "http://", "https://", *HUBS), load_from_file, force=True)


def _address(path: str) -> str:
    """Resolve the name of weights in a collection to their address; return other paths unchanged."""
    for hub, addresses in HUBS.items():
        if path.startswith(hub):
            name = path.removeprefix(hub)
            name = get_deprecated_model_names().get(name, name)
            known = addresses()
            if name not in known:
                raise UserError(f"{hub} has no weights called {name}; it has {some(known)}")
            return known[name]
    return path


def check_resumable(checkpoint: dict, path: str) -> None:
    """Check that a training can be resumed from ``checkpoint``, which was read from ``path``.

    Raises:
        UserError: If it holds only weights.
    """
    if not {"meta", "message_hub", "optimizer"} <= checkpoint.keys():
        raise UserError(
            f"{path} holds weights alone, without the state of a training; to start from these weights use "
            f"--cfg-options load_from={path} in place of --resume"
        )


def find_resumable(work_dir: str, unsafe: bool = False, warn: bool = True) -> str | None:
    """Return the newest checkpoint in ``work_dir`` from which a training can be resumed; None if there are none.

    Args:
        work_dir: Folder of the checkpoints.
        unsafe: Whether code in them may be executed.
        warn: Print a warning that names each newer checkpoint that cannot be used.

    Raises:
        UserError: If there are checkpoints, and none can be resumed from, or the last one is in a remote storage.
    """
    last = Path(work_dir, "last_checkpoint")
    named = last.read_text().strip() if last.is_file() else ""
    if named and "://" not in named and (copied := Path(work_dir, Path(named).name)).is_file():
        named = str(copied)  # where the folder was copied or moved, the path is that of the original
    saved = [path for path in Path(work_dir).glob("*.pth") if re.fullmatch(r"(epoch|iter)_[0-9]+", path.stem)]
    newest_first = sorted(saved, key=lambda path: -int(path.stem.split("_")[1]))
    candidates = [named, *newest_first] if named else newest_first
    for path in dict.fromkeys(path if "://" in str(path) else str(Path(path).resolve()) for path in candidates):
        try:
            check_resumable(read_checkpoint(path, unsafe), path)
        except UserError as error:
            if "://" in path:
                raise UserError(
                    f"{path}, the last checkpoint, is in a storage from which no training can be resumed; copy it to "
                    "this machine, and name the copy: --resume FILE"
                ) from error
            if warn:
                print(f"warning: {error}; the checkpoint before it is tried", file=sys.stderr)
        else:
            return path
    if candidates:
        raise UserError(f"no checkpoint in {work_dir} can be resumed from; start anew in another --work-dir")
    return None


def check_same_start(cfg: Config) -> None:
    """Check that all processes of a distributed training start from the same checkpoint, or from none.

    Raises:
        UserError: If they do not; each machine looks for the checkpoint to resume from in its own file system.
    """
    name = Path(cfg.load_from).name if cfg.get("load_from") else "none"
    names = all_gather_object(name)
    if len(set(names)) > 1:
        found = ", ".join(f"{name} by process {names.index(name)}" for name in dict.fromkeys(names))
        raise UserError(
            f"the processes found different checkpoints to resume from ({found}); let all machines share the work "
            "directory, or copy the checkpoint to each and name it: --resume FILE"
        )


def check_fit(checkpoint: dict, path: str, model: nn.Module, warn: bool = True) -> dict[str, Tensor]:
    """Check that ``checkpoint``, which was read from ``path``, fits ``model``, which stays as it is.

    What the model's own loading changes is taken into account: mmdet's detectors rename weights (a semi-supervised one
    those of a plain detector, a two-stage one those of a region proposal network), and backbones of mmpretrain resize
    tables of positions.

    Args:
        checkpoint: The content of the checkpoint.
        path: Where it was read from.
        model: The model that is to load it.
        warn: Print a warning if it fits only in part, or does not match the hash in its name.

    Returns:
        The weights that the model will load from it, by their keys in the model.

    Raises:
        UserError: If it fits no weight of the model, or has values that are not finite.
    """
    weights = {key.removeprefix("module."): value for key, value in checkpoint.get("state_dict", checkpoint).items()}
    expected = model.state_dict()
    fitting, misshapen, missing, unexpected = _as_loaded(weights, model)
    if not any(expected[key].dim() for key in fitting):  # scalars, such as counters, fit every model
        if misshapen:
            one = misshapen[0]
            sizes = f"{_size(weights[one])} there, {_size(expected[one])} in the model"
            reason = f"all {len(misshapen)} that have a name of the model have another shape ({one} is {sizes})"
        else:
            reason = f"the checkpoint has {some(weights)}; the model expects {some(expected)}"
        raise UserError(
            f"no weight of the checkpoint {path} fits the model: {reason}; use the configuration that the checkpoint "
            "was trained with"
        )
    if damaged := [key for key, value in fitting.items() if _is_damaged(value, expected[key])]:
        raise UserError(
            f"{path} is damaged, or its training diverged: {len(damaged)} weights have values that are not finite "
            f"({some(damaged)}); use an earlier checkpoint"
        )
    if warn and (missing or unexpected or misshapen):
        parts = [
            f"{len(keys)} {what} ({some(names)})"
            for keys, names, what in (
                (missing, _missing_parts(missing, expected), "are not in it and keep their initial values"),
                (misshapen, misshapen, "have another shape there and keep their initial values"),
                (unexpected, unexpected, "are only in it and are ignored"),
            )
            if keys
        ]
        print(
            f"warning: {path} fits the model in part: {len(fitting)} of the model's {len(expected)} weights "
            f"are loaded; {'; '.join(parts)}",
            file=sys.stderr,
        )
    if warn and (wrong := describe_wrong_hash(_address(path))):
        print(f"warning: {wrong}", file=sys.stderr)
    return fitting


def _as_loaded(weights: dict[str, Any], model: nn.Module) -> tuple[dict[str, Tensor], list[str], list[str], list[str]]:
    """Load weights into a copy of ``model`` on the meta device, whose tensors they replace.

    Returns:
        The weights that were loaded, by their keys in the model; the keys of those of another shape, of those that the
        model misses, and of those that it does not know.
    """
    probe = copy.deepcopy(model).to("meta")
    misshapen: list[str] = []
    try:
        missing, unexpected = probe.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError:  # some have another shape; the others are loaded
        misshapen = [key for key, value in probe.state_dict().items() if value.is_meta and key in weights]
        rest = {key: value for key, value in weights.items() if key not in misshapen}
        missing, unexpected = probe.load_state_dict(rest, strict=False, assign=True)
    loaded = {key: value for key, value in probe.state_dict().items() if not value.is_meta}
    return loaded, misshapen, [key for key in missing if key not in misshapen], unexpected


def _is_damaged(value: Tensor, own: Tensor) -> bool:
    """Whether a weight has values that are not finite, although the model's own values are."""
    return value.is_floating_point() and not value.isfinite().all() and bool(own.isfinite().all())


def _missing_parts(missing: list[str], expected: Mapping[str, Tensor]) -> list[str]:
    """Summarise missing weights: first the modules of which all weights are missing, then the single weights."""
    present = {prefix for key in expected.keys() - set(missing) for prefix in _prefixes(key)}
    names = dict.fromkeys(next((p for p in _prefixes(key) if p not in present), key) for key in missing)
    return sorted((name if name in expected else f"all of {name}" for name in names), key=lambda name: " " not in name)


def _prefixes(key: str) -> list[str]:
    """The names of the modules around a weight, the outermost first."""
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _size(value: Any) -> str:
    return (
        " x ".join(map(str, value.shape)) or "one number" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    )


def check_pretrained(model: nn.Module, settings: dict, unsafe: bool = False, other_conditioning: bool = False) -> None:
    """Read (and so download, once) the pretrained weights that ``model`` will start from, and load them into it.

    Args:
        model: The model.
        settings: Its settings in the configuration.
        unsafe: Whether code in the files may be executed; this project's own backbones have a setting for that.
        other_conditioning: Whether upstream's modules load weights that were trained with a conditioning; this
            project's own backbones have a setting for that, too.

    Raises:
        UserError: If they cannot be read, fit no weight, or were trained with another conditioning; the message says
            how to train without them.
    """
    for name, init_cfg in list(_pretrained(model)):
        module = model.get_submodule(name)
        place = setting_path(settings, name)
        setting = getattr(module, "weights_setting", "init_cfg.checkpoint")
        nothing = (
            ["init_cfg=None"] if setting == "init_cfg.checkpoint" else ["pretrained=False", "checkpoint_path=None"]
        )
        try:
            if getattr(module, "checks_its_weights", False):
                module.init_weights()
                continue
            weights = read_checkpoint(init_cfg["checkpoint"], unsafe)
            if not other_conditioning and (problem := difference_from(weights, init_cfg["checkpoint"], module)):
                raise UserError(f"{problem}, or load it all the same with --other-conditioning")
            before = {key: value.detach().clone() for key, value in module.named_parameters()}
            module.init_weights()
            if all(value.equal(before[key]) for key, value in module.named_parameters()):
                weights = weights.get("state_dict", weights.get("model", weights))
                raise UserError(f"none fits: the file has {some(weights)}, the model expects {some(before)}")
        except (UserError, ValueError, LookupError) as error:  # LookupError: upstream's code for files of other models
            reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error
            raise UserError(
                f"the pretrained weights {init_cfg.get('checkpoint')} cannot be loaded; train from a file with "
                f"--cfg-options {place}.{setting}=FILE or from scratch with --cfg-options "
                f"{' '.join(f'{place}.{option}' for option in nothing)} ({reason})"
            ) from error


def check_initial_weights(model: nn.Module, loaded: set[str]) -> None:
    """Check that a training starts from the initial weights that the conditioning of ``model`` sets.

    Args:
        model: The model.
        loaded: Keys of the weights that a checkpoint provides at the start of the training.

    Raises:
        UserError: If that checkpoint, or the pretrained weights of a part of ``model``, would replace them.
    """
    try:
        refuse_initial_weights(model, loaded)
        for name, _ in _pretrained(model):
            refuse_initial_weights(model.get_submodule(name))
    except ValueError as error:
        raise UserError(error) from error


def drop_pretrained(model: nn.Module, replaced: set[str]) -> None:
    """Skip the pretrained weights of those modules of ``model`` whose weights are all in ``replaced``.

    A checkpoint that is loaded after the initialisation replaces these weights, so that their files are not needed.
    """
    model = unwrapped(model)
    for name, _ in list(_pretrained(model)):
        module = model.get_submodule(name)
        if all((f"{name}.{key}" if name else key) in replaced for key in module.state_dict()):
            module.init_cfg = without_pretrained(module.init_cfg)


def _pretrained(model: nn.Module) -> Iterator[tuple[str, dict]]:
    for name, module in model.named_modules():
        if entry := pretrained_entry(getattr(module, "init_cfg", None)):
            yield name, entry
