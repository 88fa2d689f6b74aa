"""Make a checkpoint for publication: only weights and metadata, with the start of its SHA-256 in the file name."""

import hashlib
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.hooks.atomic_checkpoint import VALIDATED, WITHIN_EPOCH
from condattn.openmmlab.runner.checkpoints import add_unsafe_argument, read_checkpoint
from condattn.weights.atomic import write_atomically

KEPT = ("meta", "state_dict")
"""Entries of the published checkpoint."""
LOCAL = ("cfg", "seed", "experiment_name", "time", "iter", "epoch", VALIDATED, WITHIN_EPOCH)
"""Metadata of the training run, which are dropped; the configuration may contain local paths."""


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint file of a training")
    parser.add_argument(
        "out", type=Path, help="name of the new file, without the checksum: swin.pth becomes swin-0a1b2c3d.pth"
    )
    parser.add_argument("--keep-config", action="store_true", help="keep the configuration of the run in the metadata")
    add_unsafe_argument(parser)
    return parser.parse_args()


def main() -> None:
    """Read the checkpoint, remove what is not published, and write the new file."""
    args = parse_args()
    if args.out.suffix != ".pth":
        raise UserError(f"expected a name that ends with .pth, got {args.out}")
    checkpoint = read_checkpoint(args.checkpoint, args.unsafe)
    if "state_dict" not in checkpoint:
        raise UserError(f"{args.checkpoint} has no state_dict; its entries are {', '.join(map(str, checkpoint))}")
    weights = checkpoint["state_dict"]  # the moving average if mmengine's EMAHook was used
    kept = ("cfg",) if args.keep_config else ()
    meta = {name: value for name, value in checkpoint.get("meta", {}).items() if name not in LOCAL or name in kept}
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "weights.pth")
        torch.save({"meta": meta, "state_dict": weights}, part)
        content = part.read_bytes()
    out = args.out.with_name(f"{args.out.stem}-{hashlib.sha256(content).hexdigest()[:8]}.pth")
    write_atomically(out, lambda path: path.write_bytes(content))
    stripped = [name for name in checkpoint if name not in KEPT]
    print(f"{out}: {len(weights)} weights, {len(content):,} bytes; without {', '.join(stripped) or 'nothing'}")


if __name__ == "__main__":
    run_tool(main)
