"""ListOps: its grammar, its evaluator and its generator."""

import csv
import random
import re
import statistics
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("mmengine")

from long_range import SMALL
from long_range_arena import generate as generator
from long_range_arena import grammar, registry  # noqa: F401
from long_range_arena.grammar import Limits, evaluate, from_source, generate, to_source

from condattn.openmmlab.errors import UserError


def draw(number, limits=SMALL, seed=0):
    drawn = generate(random.Random(seed), limits, set())
    return [next(drawn) for _ in range(number)]


# The language


def by_python(source):
    """The value of an expression as Python sees it, translated to calls of functions."""
    names = dict(
        MIN=lambda *values: min(values),
        MAX=lambda *values: max(values),
        MED=lambda *values: int(statistics.median(values)),
        SM=lambda *values: sum(values) % 10,
    )
    plain = source.replace("( ", "").replace(" )", "")
    calls = re.sub(r"\[(\w+) ", r"\1(", plain).replace(" ]", ")").replace(" ", ",")
    return eval(calls, {"__builtins__": {}}, names)


def by_pairs(source):
    """The value of an expression by the pairs in parentheses of the benchmark, each of two parts."""
    calls = re.sub(r"[^() ]+", lambda match: repr(match[0]), source).replace("( ", "(").replace(" )", ")")
    functions = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(np.median(v)), "[SM": lambda v: sum(v) % 10}

    def value(node):
        if isinstance(node, str):
            return int(node) if node.isdecimal() else (node, [])
        left, right = node
        operator, values = value(left)
        return functions[operator](values) if right == "]" else (operator, [*values, value(right)])

    return value(eval(calls.replace(" ", ",")))


def test_the_evaluator_against_python():
    expressions = draw(10_000)
    values = [evaluate(tokens) for tokens in expressions]
    assert values == [by_python(to_source(tokens)) for tokens in expressions]
    assert values == [by_pairs(to_source(tokens)) for tokens in expressions]
    assert set(values) == set(range(10))


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("[MED 3 8 9 5 ]", 6), ("[MED 1 2 ]", 1), ("[SM 9 9 [MAX 1 0 ] ]", 9), ("[MIN 4 [SM 5 5 ] ]", 0)],
)
def test_values(text, value):
    assert evaluate(text.split()) == value


@pytest.mark.parametrize("text", ["", "1 2", "[MAX 1 2", "]", "[MAX ]", "[MAX 1 ] ]", "[FIRST 1 2 ]", "10"])
def test_what_is_no_expression(text):
    with pytest.raises(ValueError, match="expected"):
        evaluate(text.split())


def test_the_layout_of_the_benchmark():
    tokens = ["[MAX", "2", "[MIN", "4", "7", "]", "0", "]"]
    source = "( ( ( ( [MAX 2 ) ( ( ( [MIN 4 ) 7 ) ] ) ) 0 ) ] )"
    assert to_source(tokens) == source and from_source(source) == tokens
    assert all(from_source(to_source(drawn)) == drawn for drawn in draw(200))


def test_expressions_are_within_the_limits():
    expressions = draw(3_000)
    lengths = [len(tokens) for tokens in expressions]
    assert min(lengths) == SMALL.min_length + 1 and max(lengths) == SMALL.max_length - 1
    depths, arguments = set(), set()
    for tokens in expressions:
        counts, depth = [0], 0
        for token in tokens:
            if token == grammar.END:
                arguments.add(counts.pop())
                continue
            counts[-1] += 1
            depth = max(depth, len(counts))
            if token in grammar.OPERATORS:
                counts.append(0)
        depths.add(depth)
    assert max(depths) == SMALL.max_depth and arguments == set(range(2, SMALL.max_args + 1))
    assert len({tuple(tokens) for tokens in expressions}) == len(expressions)
    assert {token for tokens in expressions for token in tokens} == set(grammar.TOKENS)


def test_the_defaults_are_the_benchmarks():
    assert Limits() == Limits(max_depth=10, max_args=10, min_length=500, max_length=2000)
    (tokens,) = draw(1, Limits())
    assert 500 < len(tokens) < 2000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_depth=1), "depth and a number of arguments of 2 or more"),
        (dict(max_depth=3, max_args=3), "has more than 17 tokens, and more than 500 are asked for"),
        (dict(max_length=501), "larger than 500 and smaller than 501"),
        (dict(max_depth=5000), "at most 100"),
    ],
)
def test_impossible_limits(settings, message):
    with pytest.raises(UserError, match=message):
        Limits(**settings)


# The generator


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


def write(folder, seed=0, **numbers):
    return generator.write_listops(folder, numbers or dict(train=60, val=8, test=8), SMALL, seed)


def test_files_of_the_generator(tmp_path):
    answers = write(tmp_path / "a")
    write(tmp_path / "b")
    write(tmp_path / "c", seed=1)
    seen = []
    for split, number in dict(train=60, val=8, test=8).items():
        name = f"basic_{split}.tsv"
        header, *content = rows(tmp_path / "a" / name)
        assert header == ["Source", "Target"] and len(content) == number == answers[split].total()
        assert [int(target) for _, target in content] == [by_python(source) for source, _ in content]
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()
        seen += [source for source, _ in content]
    assert len(set(seen)) == len(seen)


def test_rules_without_a_model():
    train = Counter({("[MAX", 9): 3, ("[MAX", 8): 2, ("[SM", 1): 2, ("[SM", 8): 1})
    test = Counter({("[MAX", 9): 1, ("[MAX", 8): 5, ("[SM", 1): 3, ("[MIN", 0): 1})
    assert generator.describe({"train": train, "test": test}, "test") == (
        "10 expressions; right by always answering the commonest value, 8: 50.0%; by answering the outermost "
        "operator's commonest value: 40.0%"
    )


def test_nothing_is_left_of_a_generation_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(grammar, "PATIENCE", 2000)
    few = Limits(max_depth=2, max_args=2, min_length=3, max_length=5)  # 4 operators, 100 pairs of digits
    with pytest.raises(UserError, match=r"no new expression of more than 3 and fewer than 5 tokens"):
        generator.write_listops(tmp_path / "data", dict(train=401), few)
    with pytest.raises(UserError, match="positive number of expressions to val, got 0"):
        write(tmp_path / "data", train=1, val=0)
    assert not list(tmp_path.iterdir())
    generator.write_listops(tmp_path / "data", dict(train=400), few)
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "data")


# The readers
