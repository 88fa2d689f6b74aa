"""Write the built-in demo data (the demo configs do so automatically if it is missing)."""

import argparse
import inspect

from condattn.openmmlab.datasets.digit_scenes import write_digit_scenes
from condattn.openmmlab.errors import UserError, run_tool


def parse_args() -> argparse.Namespace:
    """Parse the command line; the defaults are those of ``write_digit_scenes``."""
    defaults = {name: p.default for name, p in inspect.signature(write_digit_scenes).parameters.items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("root", nargs="?", default="data/digit_scenes", help="the folder to write")
    parser.add_argument("--train", type=int, default=defaults["train"], help="number of training scenes")
    parser.add_argument("--val", type=int, default=defaults["val"], help="number of validation scenes")
    parser.add_argument("--size", type=int, default=defaults["size"], help="width and height in pixels")
    parser.add_argument("--seed", type=int, default=defaults["seed"], help="seed of all random numbers")
    return parser.parse_args()


def main() -> None:
    """Write the scenes and print their folder."""
    try:
        root = write_digit_scenes(**vars(parse_args()))
    except ValueError as error:
        raise UserError(error) from error
    print(f"digit scenes: {root}")


if __name__ == "__main__":
    run_tool(main)
