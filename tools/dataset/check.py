"""Check the data of a configuration, and report what is used, what is ignored and what cannot work."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from condattn.openmmlab.data_check.check import adapt, find, report
from condattn.openmmlab.data_check.page import PARTS, write_page
from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.runner.launch import add_config_arguments, load_config


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("--images", action="store_true", help="read every image and label map, not a sample of 5000")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write a page into this folder: per class counts, sizes, and samples with their annotations drawn",
    )
    return parser.parse_args()


def main() -> None:
    """Check the data of training, validation and test."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    if args.out and cfg.default_scope not in PARTS:
        raise UserError(f"{args.config} is of a classifier; --out is for detection and segmentation")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out: expected a folder, {args.out} is a file; name another folder, or remove the file")
    checked = find(cfg, "train", "val", "test", read_all=args.images)
    try:
        report(checked)
    finally:
        if args.out:
            for entry in checked:
                adapt(cfg, entry)
            print(f"page: {write_page(cfg, checked, args.out)}")


if __name__ == "__main__":
    run_tool(main)
