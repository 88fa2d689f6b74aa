"""Options of the tools' command lines, and the settings that they change."""

from argparse import ArgumentParser

import pytest
from runs import load_tool

pytest.importorskip("mmdet")

from mmengine.config import Config

from condattn.openmmlab.errors import UserError
from condattn.openmmlab.runner.launch import ConfigOptions


@pytest.mark.parametrize(
    "text, value",
    [
        ("4", 4),
        ("1e-3", 0.001),
        ("true", True),
        ("None", None),
        ("", ""),
        ("a,b", ["a", "b"]),
        ("[a, b]", ["a", "b"]),
        ("[]", []),
        ("(1,)", (1,)),
        ("[(1, 2), [a, b], c]", [(1, 2), ["a", "b"], "c"]),
        ("[1,2],[3,4]", [[1, 2], [3, 4]]),
        ('"[a,b]"', ["a", "b"]),
        ("my data/coco", "my data/coco"),
        ("[my data,b]", ["my data", "b"]),
        ("/data/x(a,b)", "/data/x(a,b)"),
        ("sc(strength=3.0, relative=True)+pc", "sc(strength=3.0, relative=True)+pc"),
        ("[sc(strength=3.0,relative=True),pc]", ["sc(strength=3.0,relative=True)", "pc"]),
    ],
)
def test_values_of_options(text, value):
    """Lists, tuples and plain values as mmengine reads them; texts keep their blanks."""
    parser = ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=ConfigOptions)
    assert parser.parse_args(["--cfg-options", f"key={text}"]).cfg_options == {"key": value}


def test_options_whose_brackets_are_not_balanced():
    parser = ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=ConfigOptions)
    with pytest.raises(UserError, match=r"expected KEY=VALUE without spaces, found key=\[a,b; put "):
        parser.parse_args(["--cfg-options", "key=[a,b"])


@pytest.mark.parametrize(
    "own, asked, dtype", [(None, "", "float16"), ("bfloat16", "", "bfloat16"), ("bfloat16", "float16", "float16")]
)
def test_the_dtype_of_mixed_precision(own, asked, dtype):
    """That of the configuration, unless another one is asked for."""
    cfg = Config(dict(optim_wrapper=dict(type="AmpOptimWrapper", dtype=own) if own else dict(type="OptimWrapper")))
    load_tool("train").enable_amp(cfg, asked)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == ("AmpOptimWrapper", dtype)
