"""Train a detector, a segmenter, a classifier or a model of sequences from a configuration file."""

import copy
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device

from condattn.openmmlab.data_check import check_data
from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.hooks.finite_loss import weights_blamed
from condattn.openmmlab.models.loading import check_conditioning
from condattn.openmmlab.models.settings import class_name
from condattn.openmmlab.models.wrapping import compiled_part
from condattn.openmmlab.processes import leave_processes, local_rank
from condattn.openmmlab.runner.checkpoints import (
    add_checkpoint_arguments,
    check_fit,
    check_initial_weights,
    check_pretrained,
    check_resumable,
    check_same_start,
    drop_pretrained,
    find_resumable,
    read_checkpoint,
)
from condattn.openmmlab.runner.launch import (
    add_config_arguments,
    add_runner_arguments,
    build_model,
    build_runner,
    load_runner_config,
)
from condattn.openmmlab.runner.settings import check_loop
from condattn.openmmlab.runner.sharding import check_shardable, is_sharded
from condattn.openmmlab.runner.work_dir import reserved
from condattn.wording import some


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    add_runner_arguments(parser)
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--amp",
        nargs="?",
        const=True,
        choices=["float16", "bfloat16"],
        help="train in mixed precision (needs a GPU), by default in the dtype of the configuration, else in float16",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the backbone, or the encoder or network of a model of sequences, with torch.compile, by this "
        "backend (default: inductor)",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate to the real batch size, linearly from auto_scale_lr.base_batch_size",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on with a training: from CHECKPOINT, or without one from the latest in the work directory",
    )
    return parser.parse_args()


def main() -> None:
    """Check configuration, data and weights, then train."""
    args = parse_args()
    cfg = load_runner_config(args)
    check_loop(cfg, "train")
    check_loop(cfg, "val")
    if args.amp:
        enable_amp(cfg, "" if args.amp is True else args.amp)
    if args.auto_scale_lr:
        enable_lr_scaling(cfg)
    if class_name(cfg.optim_wrapper) == "AmpOptimWrapper" and get_device() == "cpu":
        raise UserError(
            "mixed precision needs a GPU, and none was found; train without --amp, or with "
            "--cfg-options optim_wrapper.type=OptimWrapper"
        )
    if args.compile and args.compile not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends(exclude_tags=()))
        raise UserError(f"--compile: torch has no backend {args.compile}; it has {known}")
    first = local_rank(cfg.launcher) == 0
    resume = args.resume or ("auto" if cfg.get("resume") and not cfg.get("load_from") else None)
    if checkpoint := find_resumable(cfg.work_dir, args.unsafe, warn=first) if resume == "auto" else resume:
        cfg.resume, cfg.load_from = True, checkpoint
    if first:
        warn_of_earlier_checkpoints(cfg, resume)
    given = copy.deepcopy(cfg)
    check_data(cfg, "train", "val")
    train(cfg, args, check_weights(cfg, args), given)
    leave_processes()


def warn_of_earlier_checkpoints(cfg: Config, resume: str | None) -> None:
    """Say that there was nothing to resume, and that the work directory has checkpoints of another training.

    Args:
        cfg: The configuration.
        resume: The checkpoint to go on from, 'auto' for the latest one in the work directory, or None.
    """
    start = cfg.load_from if cfg.get("resume") else None
    if resume and not start:
        print(f"warning: {cfg.work_dir} has no checkpoint to resume from; the training begins anew", file=sys.stderr)
    saved = sorted(path.name for path in Path(cfg.work_dir).glob("*.pth"))
    if saved and not (start and Path(start).resolve().parent == Path(cfg.work_dir).resolve()):
        print(
            f"warning: {cfg.work_dir} has checkpoints of an earlier training ({some(saved)}), which this one "
            "overwrites where names are equal; to go on with that one use --resume, or --resume FILE, to keep it "
            "another --work-dir",
            file=sys.stderr,
        )


def enable_amp(cfg: Config, dtype: str) -> None:
    """Change the configuration to mixed precision in ``dtype``; if that is '', in its own, or else in float16."""
    wrapper = class_name(cfg.optim_wrapper) or "OptimWrapper"
    if wrapper not in ("OptimWrapper", "AmpOptimWrapper"):
        raise UserError(f"--amp expects optim_wrapper.type OptimWrapper, found {wrapper}")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.dtype = dtype or cfg.optim_wrapper.get("dtype") or "float16"


def enable_lr_scaling(cfg: Config) -> None:
    """Change the configuration to scale the learning rate to the real batch size."""
    if not (cfg.get("auto_scale_lr") or {}).get("base_batch_size"):
        raise UserError(
            f"--auto-scale-lr expects auto_scale_lr.base_batch_size in {cfg.filename}, the batch size that "
            "its learning rate belongs to; add --cfg-options auto_scale_lr.base_batch_size=N"
        )
    cfg.auto_scale_lr.enable = True


def train(cfg: Config, args: Namespace, replaced: set[str], given: Config) -> None:
    """Train the model with mmengine's runner.

    Args:
        cfg: The configuration.
        args: The command line.
        replaced: Keys of the weights that a checkpoint will provide.
        given: The configuration before it was adapted to the data.
    """
    with reserved(cfg):
        runner = build_runner(cfg, args.other_conditioning, given)
        check_same_start(cfg)
        drop_pretrained(runner.model, replaced)
        if args.compile:
            compiled_part(runner.model).compile(backend=args.compile)
        with weights_blamed(runner):
            runner.train()


def check_weights(cfg: Config, args: Namespace) -> set[str]:
    """Check the model and the weights it will start from; return the keys that a checkpoint provides."""
    resuming = bool(cfg.get("resume"))
    path = cfg.get("load_from")
    checkpoint = read_checkpoint(path, args.unsafe) if path else None
    if checkpoint and resuming:
        check_resumable(checkpoint, path)
    model = build_model(cfg)
    if args.compile:
        compiled_part(model)
    if is_sharded(cfg):
        check_shardable(model)
    first = local_rank(cfg.launcher) == 0
    loaded = set()
    if checkpoint:
        loaded = set(check_fit(checkpoint, path, model, warn=first))
        if not args.other_conditioning:
            check_conditioning(checkpoint, path, model)
    if not resuming:
        check_initial_weights(model, loaded)
    drop_pretrained(model, replaced=loaded)
    if first:
        check_pretrained(model, cfg.model, args.unsafe, args.other_conditioning)
    return loaded


if __name__ == "__main__":
    run_tool(main)
