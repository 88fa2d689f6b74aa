"""The guides in docs/: their Python blocks run in order, and print what the comments after print() say."""

import ast
import contextlib
import functools
import io
import json
import re
from pathlib import Path

import pytest
import torch
from registrations import registrations_undone

ROOT = Path(__file__).parents[1]
GUIDES = {
    "adding_an_attention_class.md": (9, 5),
    "adding_a_method.md": (5, 3),
    "methods.md": (3, 1),
    "getting_started/torch.md": (8, 7),
    "deployment.md": (5, 2),
    "measuring.md": (3, 2),
}
"""The numbers of blocks and of printed lines."""
NEEDED = {"deployment.md": ("peft", "onnxruntime", "onnxscript")}


def matches(line, comment):
    """Whether a printed line matches a comment, in which three dots stand for any text."""
    return re.fullmatch(".*".join(map(re.escape, comment.split("..."))), line)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_blocks_of_a_guide(guide, monkeypatch, tmp_path):
    for package in ("timm", *NEEDED.get(guide, ())):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    # TorchInductor needs a compiler and takes long; tests/test_hosts.py uses it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    text = (ROOT / "docs" / guide).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    comments = re.findall(r"^ *print\(.*\)  # (.*)$", "".join(blocks), re.MULTILINE)
    assert (len(blocks), len(comments)) == GUIDES[guide]
    printed = io.StringIO()
    with registrations_undone(), contextlib.redirect_stdout(printed):
        names = {"__name__": "my_package.models"}
        for block in blocks:
            exec(compile(block, guide, "exec"), names)
    lines = printed.getvalue().splitlines()
    assert len(lines) == len(comments)
    for line, comment in zip(lines, comments, strict=True):
        assert matches(line, comment), (line, comment)


def test_the_tour():
    """Run the code of the notebook, cell by cell."""
    pytest.importorskip("timm")
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 6 and not any(cell.get("outputs") for cell in cells)
    names, printed = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(code):
            exec(compile(source, f"tour.ipynb, cell {number}", "exec"), names)
    assert "conditioned 4 of 4 attention sites: sc+pc" in printed.getvalue()


def test_the_readme(tmp_path):
    """The example for any model runs and prints what it says; the config loads; the data's block is the template's."""
    pytest.importorskip("timm")
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    example, measuring, config, own_data = blocks
    names, printed = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in (example, measuring):
            exec(compile(block, "README.md", "exec"), names)
    lines = printed.getvalue().splitlines()
    assert matches(lines[0], re.search(r"print\(report\)  # (.*)", example)[1])
    assert any("'kappa'" in line for line in lines[1:])

    pytest.importorskip("mmdet")
    from mmengine.config import Config

    (tmp_path / "config.py").write_text(config)
    assert Config.fromfile(tmp_path / "config.py").model.backbone.type == "ConditionedSwinTransformer"
    template = ast.parse((ROOT / "configs" / "own_data" / "coco.py").read_text())
    assigned = {target.id for node in template.body if isinstance(node, ast.Assign) for target in node.targets}
    used = {target.id for node in ast.parse(own_data).body for target in node.targets}
    assert used <= assigned and "_base_" in used


def test_the_configs_that_convert_pretrained_weights(tmp_path):
    """The blocks of configs/README.md change what they say, and keep the weights of the config that they inherit."""
    pytest.importorskip("mmdet")
    from mmengine.config import Config

    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "configs" / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    loaded = []
    for number, block in enumerate(blocks):
        path = tmp_path / f"config_{number}.py"
        path.write_text(block.replace('_base_ = "', f'_base_ = "{ROOT}/configs/'))
        loaded.append(Config.fromfile(path))
    calibrated, effective = loaded
    assert [hook["type"] for hook in calibrated.custom_hooks] == ["CalibrationHook"]
    weights = calibrated.model.backbone.init_cfg
    assert weights.type == "Pretrained"
    assert effective.model.backbone.init_cfg == {**weights, "load": "effective"}
