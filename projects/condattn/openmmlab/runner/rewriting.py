"""Code shared by the tools that use images to make a new checkpoint from another one."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from ...spectra.measure import spread
from ...weights.atomic import write_atomically
from ...wording import counted, some
from ..errors import UserError
from ..models.loading import ENTRY, record_of, with_record
from .checkpoints import add_unsafe_argument, read_checkpoint
from .inference import find_images, image_reader, unreadable
from .launch import add_config_arguments, load_config


def add_rewriting_arguments(parser: ArgumentParser, images: int, use: str) -> None:
    """Add the configuration, the checkpoint, the images, the new file and the device.

    Args:
        parser: The parser of the tool.
        images: Default number of images.
        use: What the images are used for, as the end of a sentence in the help.
    """
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="file or URL of the weights")
    parser.add_argument(
        "--images", type=Path, required=True, help=f"folder of images like those of the training, {use}"
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write; it must not exist")
    parser.add_argument("--num", type=int, default=images, help="how many images are used (default: %(default)s)")
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: the GPU, if there is one)")
    add_unsafe_argument(parser)


def load_inputs(args: Namespace) -> tuple[Config, dict, list[Path]]:
    """Load the configuration and the checkpoint, and choose ``args.num`` evenly spaced images of the folder.

    A warning names those that cannot be read, which are left out.

    Raises:
        UserError: If one of them is invalid, or the file to write exists.
    """
    if args.num < 1:
        raise UserError(f"--num: expected at least 1, got {args.num}")
    refuse_existing(args.out)
    cfg = load_config(args.config, args.cfg_options)
    chosen = spread([path for path, _ in find_images(args.images, args.out.parent)], args.num)
    reasons = unreadable(chosen, image_reader(cfg))
    images = [path for path in chosen if path not in reasons]
    if reasons:
        named = some(f"{path} ({reason})" for path, reason in reasons.items())
        text = f"{counted(len(reasons), 'image')} cannot be read: {named}"
        if not images:
            raise UserError(f"{text}; replace them")
        print(f"warning: {text}; left out", file=sys.stderr)
    return cfg, read_checkpoint(args.checkpoint, args.unsafe), images


def refuse_existing(path: Path) -> None:
    """Raise a UserError if ``path`` exists."""
    if path.exists():
        raise UserError(f"{path} exists already; choose another name, or remove it first")


def write_checkpoint(path: Path, model: nn.Module, meta: dict) -> None:
    """Write the weights of ``model``, its conditioning and other metadata."""
    weights = with_record({name: value.cpu() for name, value in model.state_dict().items()}, model)
    content = {"meta": {**meta, ENTRY: record_of(model)}, "state_dict": weights}
    write_atomically(path, lambda part: torch.save(content, part))
