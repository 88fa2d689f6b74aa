"""Convert pretrained weights of a Swin, ViT, XCiT or DaViT backbone to the parameter names of another library."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.models.loading import ENTRY, Record, recorded, renamed_record
from condattn.openmmlab.runner.checkpoints import add_unsafe_argument
from condattn.weights.atomic import write_atomically
from condattn.weights.files import BadFileError, read_file, weights_of
from condattn.weights.load import block_weights, some
from condattn.weights.names import FORMATS, recognize, translate

TARGETS = ("mmdet", "mmseg", "timm", "official")


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", help="file (.pth, .pt, .bin, .safetensors) or URL of the weights")
    parser.add_argument("target", help="file to write (.pth or .safetensors); it must not exist")
    parser.add_argument("--to", required=True, choices=TARGETS, help="library whose parameter names the weights get")
    add_unsafe_argument(parser)
    return parser.parse_args()


def main() -> None:
    """Convert the weights, and print the recognised format and the names of weights that were left out."""
    args = parse_args()
    try:
        content = read_file(args.source, args.unsafe)
        weights, beside, where = weights_of(content, args.source)
    except BadFileError as error:
        raise UserError(error) from error
    source = recognize(weights)
    if source is None:
        families = ", ".join(dict.fromkeys(format.family for format in FORMATS))
        raise UserError(f"{args.source} has names of no known format ({some(weights)}); known are those of {families}")
    target = next((one for one in FORMATS if one.family == source.family and args.to in one.names), None)
    if target is None:
        takers = ", ".join(name for one in FORMATS if one.family == source.family for name in one.names)
        raise UserError(f"{args.source} is a {source}, for which {args.to} has no names; these have: {takers}")
    converted, left_out = translate(weights, source, target)
    if strange := block_weights(left_out):
        raise UserError(f"{args.source} has weights for which {target} has no names: {some(strange)}")
    named = {target.prefix + name: value.contiguous() for name, value in converted.items()}
    record = renamed_record(recorded(content), weights, source, target)
    record = {target.prefix + name: methods for name, methods in record.items()}
    suffix = Path(args.target).suffix
    if any(record.values()) and suffix == ".safetensors":
        raise UserError(
            f"{args.source} was trained with conditioned attention, which it records, and a .safetensors file has no "
            "place for the record; choose a name with .pth"
        )
    write_atomically(args.target, lambda path: save(named, path, suffix, record))
    print(f"{where}: {source}; {len(named)} weights written to {args.target} as {target}")
    if left_out + beside:
        print(f"left out: {len(left_out + beside)} ({some(left_out + beside, 10)})")


def save(weights: dict[str, torch.Tensor], path: Path, suffix: str, record: Record) -> None:
    """Write weights in the file format that belongs to the suffix, and the record of conditioning if there is one."""
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: value.clone() for name, value in weights.items()}, path)
    else:
        meta = {"meta": {ENTRY: record}} if record else {}
        torch.save({**meta, "state_dict": weights}, path)


if __name__ == "__main__":
    run_tool(main)
