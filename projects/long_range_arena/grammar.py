"""The language of ListOps: expressions of lists of digits, their values, and how the benchmark writes them down.

An expression is a digit, or an operator with two or more arguments that are expressions::

    [MAX 2 9 [MIN 4 7 ] 0 ]  ->  9

Here it is a list of tokens; ``length`` counts them. The files of the benchmark write it as nested pairs in
parentheses, which are no tokens: ``( ( ( [MIN 4 ) 7 ) ] )``.

Source:
    The Long Range Arena (arXiv 2011.04006), whose generator has these operators, probabilities and defaults.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from condattn.openmmlab.errors import UserError

END = "]"
OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: _median(sorted(values)),
    "[SM": lambda values: sum(values) % 10,
}
"""Token of an operator -> its value for values of its arguments: minimum, maximum, median, sum modulo 10."""
TOKENS = (*OPERATORS, END, *map(str, range(10)))
"""All tokens; the number of the first is 1, because 0 is padding."""
OPERATOR_SHARE = 0.25
"""Probability that an expression is an operator with arguments, above the largest depth."""
PATIENCE = 1_000_000
"""How many expressions in a row may be unusable (too short, too long, drawn before) before generation gives up."""


def _median(values: list[int]) -> int:
    """The median of ascending integers, rounded down."""
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) // 2


@dataclass(frozen=True)
class Limits:
    """How large expressions are; the defaults are those of the benchmark.

    Attributes:
        max_depth: Largest depth of nesting; the outermost operator has depth 1, and at this depth all are digits.
        max_args: Largest number of arguments of an operator; the smallest is 2.
        min_length: Expressions have more tokens than this.
        max_length: Expressions have fewer tokens than this.

    Raises:
        UserError: If no expression is within the limits.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    max_length: int = 2000

    def __post_init__(self):
        if self.max_depth < 2 or self.max_args < 2:
            raise UserError(
                f"expected a depth and a number of arguments of 2 or more, got {self.max_depth} and {self.max_args}"
            )
        if self.max_depth > 100:
            raise UserError(f"expected a depth of at most 100, got {self.max_depth}")
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = 2 + self.max_args * longest
        if self.min_length >= longest:
            raise UserError(
                f"no expression of depth {self.max_depth} with {self.max_args} arguments has more than {longest} "
                f"tokens, and more than {self.min_length} are asked for; raise the depth or the number of arguments"
            )
        if self.max_length < self.min_length + 2:
            raise UserError(
                f"lengths are larger than {self.min_length} and smaller than {self.max_length}, which no number is"
            )


class _TooLong(Exception):
    """The expression that is being drawn has too many tokens."""


def generate(rng: random.Random, limits: Limits, seen: set[int]) -> Iterator[list[str]]:
    """Draw different expressions, without end.

    Args:
        rng: Where randomness comes from.
        limits: How large they are.
        seen: Hashes of the expressions that were drawn before and are not drawn again; new ones are added.

    Raises:
        UserError: If nothing usable is found in ``PATIENCE`` attempts.
    """
    unusable = 0
    while unusable < PATIENCE:
        tokens: list[str] = []
        try:
            _draw(rng, limits, 1, tokens)
        except _TooLong:
            unusable += 1
            continue
        mark = hash_of(tokens)
        if len(tokens) <= limits.min_length or mark in seen:
            unusable += 1
            continue
        seen.add(mark)
        unusable = 0
        yield tokens
    raise UserError(
        f"{PATIENCE:,} attempts in a row gave no new expression of more than {limits.min_length} and fewer than "
        f"{limits.max_length} tokens; allow other lengths, or ask for fewer expressions"
    )


def _draw(rng: random.Random, limits: Limits, depth: int, tokens: list[str]) -> None:
    """Append an expression of ``depth`` to ``tokens``."""
    if len(tokens) >= limits.max_length - 1:
        raise _TooLong
    if depth >= limits.max_depth or rng.random() > OPERATOR_SHARE:
        tokens.append(str(rng.randrange(10)))
        return
    tokens.append(rng.choice(tuple(OPERATORS)))
    for _ in range(rng.randint(2, limits.max_args)):
        _draw(rng, limits, depth + 1, tokens)
    if len(tokens) >= limits.max_length - 1:
        raise _TooLong
    tokens.append(END)


def hash_of(tokens: Sequence[str]) -> int:
    """A number of 64 bits that identifies an expression, the same in every process."""
    text = " ".join(tokens).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def evaluate(tokens: Sequence[str]) -> int:
    """The value of an expression, from 0 to 9.

    Raises:
        ValueError: If it is none.
    """
    open_lists: list[tuple[str, list[int]]] = [("", [])]
    for token in tokens:
        if token in OPERATORS:
            open_lists.append((token, []))
            continue
        if token == END:
            operator, values = open_lists.pop()
            if not operator or not values:
                raise ValueError(f"expected an expression, found {END} without an operator or arguments before it")
            value = OPERATORS[operator](values)
        elif token in TOKENS:
            value = int(token)
        else:
            raise ValueError(f"expected one of {' '.join(TOKENS)}, found {token!r}")
        open_lists[-1][1].append(value)
    if len(open_lists) > 1 or len(open_lists[0][1]) != 1:
        raise ValueError("expected one expression, whose lists all end")
    return open_lists[0][1][0]


def to_source(tokens: Sequence[str]) -> str:
    """An expression as the benchmark writes it, with parentheses."""
    open_lists: list[list[str]] = [[]]
    for token in tokens:
        if token in OPERATORS:
            open_lists.append([token])
            continue
        text = token
        if token == END:
            operator, *arguments = open_lists.pop()
            text = "( " * (len(arguments) + 1) + " ".join([operator, *(f"{part} )" for part in (*arguments, END))])
        open_lists[-1].append(text)
    return " ".join(open_lists[0])


def from_source(source: str) -> list[str]:
    """The tokens of an expression in a file, without parentheses."""
    return source.replace("(", "").replace(")", "").split()
