"""Generate ListOps by the benchmark's grammar, in the layout of its archive: basic_{train,val,test}.tsv."""

import argparse
import csv
import itertools
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from condattn.openmmlab.errors import UserError, run_tool

from .grammar import Limits, evaluate, generate, to_source

COLUMNS = ("Source", "Target")


def parse_args() -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        prog="python -m long_range_arena.generate",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    limits = Limits()
    parser.add_argument("folder", help="the folder to write, which must not exist")
    parser.add_argument("--train", type=int, default=96_000, help="number of expressions to train on")
    parser.add_argument("--val", type=int, default=2_000, help="number of expressions to validate on")
    parser.add_argument("--test", type=int, default=2_000, help="number of expressions to test on")
    parser.add_argument("--max-depth", type=int, default=limits.max_depth, help="largest depth of nesting")
    parser.add_argument("--max-args", type=int, default=limits.max_args, help="largest number of arguments")
    parser.add_argument("--min-length", type=int, default=limits.min_length, help="expressions have more tokens")
    parser.add_argument("--max-length", type=int, default=limits.max_length, help="expressions have fewer tokens")
    parser.add_argument("--seed", type=int, default=0, help="start of all randomness")
    return parser.parse_args()


def write_listops(
    folder: str | Path, numbers: Mapping[str, int], limits: Limits, seed: int = 0
) -> dict[str, Counter[tuple[str, int]]]:
    """Write ``basic_{split}.tsv``, with the columns Source and Target, for each split; no expression is in two of them.

    Expressions are written as they are drawn. The folder appears when it is complete.

    Args:
        folder: The folder, which must not exist.
        numbers: Name of a split -> number of its expressions.
        limits: How large expressions are.
        seed: Equal seeds give equal files.

    Returns:
        Name of a split -> how often each pair of the first token and the value occurs.

    Raises:
        UserError: If the folder exists, a number is not positive, or there are not enough expressions.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; name another folder, or remove it first")
    for split, number in numbers.items():
        if number < 1:
            raise UserError(f"expected a positive number of expressions to {split}, got {number}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        seen: set[int] = set()
        answers: dict[str, Counter[tuple[str, int]]] = {split: Counter() for split in numbers}
        for split, number in numbers.items():
            drawn = itertools.islice(generate(random.Random(f"{seed} {split}"), limits, seen), number)
            with (part / f"basic_{split}.tsv").open("w", newline="") as file:
                writer = csv.writer(file, delimiter="\t")
                writer.writerow(COLUMNS)
                for tokens in tqdm(drawn, desc=split, total=number, unit=" expressions"):
                    value = evaluate(tokens)
                    answers[split][tokens[0], value] += 1
                    writer.writerow((to_source(tokens), value))
        part.chmod(0o755)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return answers


def describe(answers: Mapping[str, Counter[tuple[str, int]]], split: str) -> str:
    """Say what two rules without a model score on a split.

    One always answers the commonest value of the split. The other reads the first token, the outermost operator, and
    answers the commonest value that it has in the split ``train``. A model that scores no more has learnt no more.
    """
    known: dict[str, Counter[int]] = {}
    for (first, value), times in answers["train"].items():
        known.setdefault(first, Counter())[value] += times
    number = answers[split].total()
    values: Counter[int] = Counter()
    right = 0
    for (first, value), times in answers[split].items():
        values[value] += times
        right += times * (first in known and known[first].most_common(1)[0][0] == value)
    ((value, times),) = values.most_common(1)
    return (
        f"{number:,} expressions; right by always answering the commonest value, {value}: {times / number:.1%}; by "
        f"answering the outermost operator's commonest value: {right / number:.1%}"
    )


def main() -> None:
    """Write the data and say where they are, and what rules without a model score on them."""
    args = parse_args()
    limits = Limits(args.max_depth, args.max_args, args.min_length, args.max_length)
    answers = write_listops(args.folder, dict(train=args.train, val=args.val, test=args.test), limits, args.seed)
    for split in answers:
        print(f"{args.folder}/basic_{split}.tsv: {describe(answers, split)}")


if __name__ == "__main__":
    run_tool(main)
