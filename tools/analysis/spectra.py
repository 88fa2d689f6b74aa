"""Measure condition numbers and entropy of a model's attention, and how conditioning changes them."""

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

import condattn
from condattn.methods.parsing import split_names
from condattn.openmmlab.config_files import is_config
from condattn.openmmlab.data_check import check_data
from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.models.loading import difference_from
from condattn.openmmlab.models.settings import conditioned_parts
from condattn.openmmlab.runner.checkpoints import add_checkpoint_arguments
from condattn.openmmlab.runner.inference import Predictor, find_images, image_reader, unreadable
from condattn.openmmlab.runner.launch import add_config_arguments, choose_device, load_config
from condattn.spectra import QUANTITIES, Measurement, measure
from condattn.spectra.advice import find_warnings
from condattn.spectra.measure import spread
from condattn.spectra.report import cell, check_folder, summary, title_of, write_report
from condattn.weights.files import read_file
from condattn.weights.load import load_pretrained, load_weights
from condattn.wording import some


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser, "; or the name of a model of timm, such as vit_base_patch16_224")
    parser.add_argument("checkpoint", nargs="?", help="file or URL of weights (default: initial weights)")
    parser.add_argument("--pretrained", action="store_true", help="load timm's pretrained weights of the model")
    add_checkpoint_arguments(parser)
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--images", type=Path, help="measure the attention on images from this folder too")
    images.add_argument("--dataset", choices=["train", "val", "test"], help="or on images of the configuration's data")
    parser.add_argument("--num", type=int, default=8, help="how many images are used (default: %(default)s)")
    parser.add_argument("--compare", help="measure the same weights under several conditionings, e.g. none,pc,sc,sc+pc")
    parser.add_argument("--jacobian", action="store_true", help="also the Jacobians of the heads, which takes long")
    parser.add_argument("--heads", type=int, default=1, help="number of heads for --jacobian (default: %(default)s)")
    parser.add_argument("--sites", type=int, help="number of attention sites to measure, evenly spread (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables, plots and report.html")
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: the GPU, if there is one)")
    return parser.parse_args()


def main() -> None:
    """Measure every variant, print the summary, and write the report."""
    args = parse_args()
    MMLogger.get_current_instance().setLevel("WARNING")
    for name in ("num", "heads", "sites"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.pretrained and (args.checkpoint or is_config(args.config)):
        raise UserError("--pretrained is for the name of a model of timm, without a checkpoint")
    if args.jacobian and not (args.images or args.dataset):
        raise UserError("--jacobian expects images; add --images FOLDER or --dataset val")
    try:
        check_folder(args.out)
    except ValueError as error:
        raise UserError(f"--out: {error}") from error
    paths = chosen_images(args)
    measurements: dict[str, Measurement] = {}
    for label in split_names(args.compare) if args.compare else [None]:
        try:
            model, run = build(args, label, paths)
            quantities = [*QUANTITIES, "jacobian"] if args.jacobian else QUANTITIES
            names = [site.name for site in condattn.find_sites(model)]
            chosen = spread(names, args.sites) if args.sites else None
            measurements[label or args.config] = measure(
                model, run, quantities if run else ["weights"], chosen, max_heads=args.heads
            )
        except ValueError as error:
            raise UserError(error) from error
    if not any(measurement.rows() for measurement in measurements.values()):
        reasons = [f"{name} of {s}: {why}" for m in measurements.values() for (s, name), why in m.left_out.items()]
        raise UserError(
            f"nothing of {args.config} could be measured: {'; '.join(reasons[:3]) or 'give --images FOLDER'}"
        )
    print_summary(measurements)
    weights = args.checkpoint or ("timm's pretrained weights" if args.pretrained else "")
    for line in find_warnings(measurements, trained=bool(weights)):
        print(f"warning: {line}")
    title = f"Condition numbers of attention: {args.config}, {weights or 'initial weights'}"
    for path in write_report(measurements, args.out, title, trained=bool(weights)):
        print(path)


def chosen_images(args: Namespace) -> list[Path]:
    """Paths of ``args.num`` images, evenly spread over the folder or the data set that the command line names, if any.

    Raises:
        UserError: If the folder has no image that can be read, or the data cannot be used.
    """
    if args.dataset:
        if not is_config(args.config):
            raise UserError(f"--dataset expects a configuration; give --images FOLDER for {args.config}")
        return dataset_images(load_config(args.config, args.cfg_options), args.dataset, args.num)
    if not args.images:
        return []
    own = args.out.resolve()
    paths = [path for path, _ in find_images(args.images, args.out) if not path.resolve().is_relative_to(own)]
    read = image_reader(load_config(args.config, args.cfg_options)) if is_config(args.config) else read_rgb
    reasons = unreadable(paths, read)
    if len(reasons) == len(paths):
        reason = some(reasons.values(), 1) or "all are in --out"
        raise UserError(f"no image below {args.images} can be read: {reason}; name another folder")
    return spread([path for path in paths if path not in reasons], args.num)


def read_rgb(path: Path) -> Image.Image:
    """Read an image file as timm's transforms expect it."""
    return Image.open(path).convert("RGB")


def build(args: Namespace, conditioning: str | None, paths: list[Path]) -> tuple[nn.Module, Callable | None]:
    """Build the model under a conditioning (None: that of the configuration).

    Returns:
        The model, and a function that runs it on the images, or None if there are no images.
    """
    device = choose_device(args.device)
    torch.manual_seed(0)  # the same initial weights for every variant
    if not is_config(args.config):
        return build_timm(args, conditioning, paths, device)
    cfg = load_config(args.config, args.cfg_options)
    conditioned = conditioned_parts(cfg.model)
    for part in conditioned if conditioning else []:
        part.conditioning = conditioning
    other = args.other_conditioning or bool(conditioning)
    predictor = Predictor(cfg, args.checkpoint, device, other, args.unsafe, bool(paths))
    if conditioning and not conditioned:
        condattn.condition(predictor.model, conditioning)
    return predictor.model, (lambda: [predictor.run([path]) for path in paths]) if paths else None


def build_timm(args: Namespace, conditioning: str | None, paths: list[Path], device: torch.device):
    """Build a model of timm; see :func:`build`."""
    import timm

    from condattn.openmmlab.models.timm import pretrained_weights

    if not timm.is_model(args.config):
        raise UserError(
            f"no configuration file and no model of timm: {args.config}; name a file such as "
            "configs/mask_rcnn_swin_pc.py, or a model that timm.list_models() lists"
        )
    if args.cfg_options:
        raise UserError(f"--cfg-options expects a configuration, found the model {args.config}")
    model = timm.create_model(args.config)
    if args.pretrained:
        print(load_weights(model, pretrained_weights(args.config), f"timm's {args.config}"))
    if args.checkpoint:
        print(load_pretrained(model, args.checkpoint, unsafe=args.unsafe))
    condattn.condition(model, conditioning or "none")
    if args.checkpoint and not args.other_conditioning and not conditioning:
        problem = difference_from(read_file(args.checkpoint, args.unsafe), args.checkpoint, model)
        if problem:
            raise UserError(f"{problem}; name that with --compare, or measure without it with --other-conditioning")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    model.to(device)
    inputs = [transform(read_rgb(path))[None].to(device) for path in paths]
    return model, (lambda: [model(one) for one in inputs]) if inputs else None


def dataset_images(cfg: Config, name: str, count: int) -> list[Path]:
    """Paths of ``count`` images, evenly spread over a data set of the configuration, whose data are checked first."""
    loader = f"{name}_dataloader"
    if not cfg.get(loader):
        raise UserError(f"--dataset {name}: {cfg.filename} has no {loader}; choose another, or give --images FOLDER")
    try:
        check_data(cfg, name)
        dataset = DATASETS.build(copy.deepcopy(cfg[loader].dataset))
    except (UserError, OSError) as error:
        raise UserError(f"--dataset {name}: {error}; or give --images FOLDER") from error
    chosen = [dataset.get_data_info(index) for index in spread(range(len(dataset)), count)]
    if not all("img_path" in sample for sample in chosen):
        raise UserError(f"--dataset {name}: {type(dataset).__name__} has no image files; give --images FOLDER")
    return [Path(sample["img_path"]) for sample in chosen]


def print_summary(measurements: dict[str, Measurement]) -> None:
    """Print a table with one row for each model and site."""
    console = Console()
    console = console if console.is_terminal else Console(width=180)
    title = "Condition numbers (largest singular value / smallest nonzero one), medians over heads, images and windows"
    table = Table(title=title, title_justify="left")
    rows = summary(measurements)
    for name in rows[0]:
        table.add_column(title_of(name), overflow="fold", no_wrap=name == "site")
    for row in rows:
        table.add_row(*map(cell, row.values()))
    console.print(table)


if __name__ == "__main__":
    run_tool(main)
