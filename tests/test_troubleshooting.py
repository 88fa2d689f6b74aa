"""docs/troubleshooting.md has messages of the source, and all that the tests of bad input expect."""

import ast
import re
from difflib import SequenceMatcher
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
LINES = re.findall(r"^(?:### |Also: )(`.*`)$", PAGE, re.MULTILINE)
MESSAGES = [message for line in LINES for message in re.findall(r"`([^`]+)`", line)]
EXPECTING = (
    *("test_bad_input", "test_bad_files", "test_bad_weights", "test_condition", "test_parsing", "test_rules"),
    *("test_fault_tolerance", "test_tokens"),
    *("test_checkpoints", "test_conditioning_guard", "test_initialization"),
)
FOREIGN = {"ImportError: libGL.so.1", "ModuleNotFoundError: No module named 'mmengine'"}
"""Messages of other software."""
IGNORED = {
    "of mmengine, which 'cannot read the configuration' quotes": (
        *("was never closed", "no.py", "no_such_module", "nowhere", "TypeError: embed_dims"),
    ),
    "of mmengine and Python, which 'the model of ... cannot be built' quotes": (
        "ConditionedSvin",
        "'zz'; it is model.zz",
    ),
    "of Python, which 'the rule for ... is wrong' and 'the rule for the tokens of ... is wrong' quote": (
        *("KeyError: 'module'", "unexpected keyword argument 'masks'", "no attribute 'blocks'"),
        "TypeError: 'NoneType' object is not subscriptable",
        *("unexpected keyword argument 'heads'", " argument: 'num_heads'"),
        "AttributeError: 'Separate' object has no attribute 'num_heads'",
    ),
    "of mmengine, behind 'expected default_scope'": ("mmdet, mmseg, mmpretrain",),
    "values in messages that the page has": (
        *("val2017", "bad.py", "it has no blocks.2.norm1.weight", "--device abacus", "timm:test_vit"),
        *("patch_embed.proj.weight is 24 x 3 x 8 x 8 there", "(decoder.layers.0 and . more): it is a test"),
    ),
}
SHARED = 12
"""So many characters in common make a message the expected one; fewer, if the whole of a shorter text is in it."""


def templates():
    """Texts of the source, with a NUL in the place of each value."""
    for file in [*ROOT.glob("projects/**/*.py"), *ROOT.glob("tools/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    for script in [*ROOT.glob("requirements/*.sh"), *ROOT.glob("tools/*.sh")]:
        yield from script.read_text().replace('" \\\n        "', " ").splitlines()


def pieces(message):
    return [piece for piece in message.split("...") if piece.strip()]


@pytest.fixture(scope="module")
def source():
    return "\n".join(" ".join(text.split("\n")) for text in templates())


@pytest.mark.parametrize("message", [message for message in MESSAGES if message not in FOREIGN])
def test_the_source_has_the_message(message, source):
    assert max(map(len, pieces(message))) >= 8
    assert re.search(".*".join(map(re.escape, pieces(message))), source), message


def constants(node):
    """The texts in a tuple, or a text alone, of which a pattern is cut where it stands for anything."""
    if isinstance(node, ast.Tuple):
        return [text for element in node.elts for text in constants(element)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [re.sub(r"\\(.)", r"\1", text) for text in re.split(r"\.\*|\|", node.value) if text]
    return []


def expectations(tree):
    """What the tests of a file expect of messages, each as texts of which one message has all."""
    for node in ast.walk(tree):
        name = node.arg if isinstance(node, ast.keyword) else ""
        if isinstance(node, ast.Assign):
            name = getattr(node.targets[0], "id", "")
        if name in ("match", "parts", "message"):
            yield constants(node.value)
        elif name in ("FILES", "CHECKPOINTS"):
            for value in node.value.values:
                yield constants(value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_refused":
            yield constants(node.args[1])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "parametrize":
            names = re.findall(r"\w+", ast.unparse(node.args[0]))
            for index in {names.index(name) for name in ("part", "parts", "message") if name in names}:
                for case in node.args[1].elts:
                    yield constants(case.elts[index])


def covers(message, text):
    return any(
        SequenceMatcher(None, piece, text, autojunk=False).find_longest_match().size >= min(SHARED, len(text))
        for piece in pieces(message)
    )


@pytest.mark.parametrize("name", EXPECTING)
def test_the_page_has_what_the_tests_expect(name):
    found = [texts for texts in expectations(ast.parse((ROOT / "tests" / f"{name}.py").read_text())) if texts]
    assert len(found) > 2
    ignored = [text for texts in IGNORED.values() for text in texts]
    missing = [
        texts
        for texts in found
        if not any(covers(message, text) for text in texts for message in MESSAGES if len(text) >= 5)
        and not any(text.endswith(tuple(ignored)) for text in texts)
    ]
    assert not missing, f"docs/troubleshooting.md says nothing of {missing}"
