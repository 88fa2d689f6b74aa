"""Mixed stacks are refused with a one-line error, and one import registers what a stack has."""

import importlib
import os
import re
import subprocess
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from condattn import stack


def pretend(monkeypatch, **versions):
    def version(name):
        if name.replace("-", "_") not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    "versions",
    [
        {},
        dict(mmcv="2.1.0", mmengine="0.10.7", mmdet="3.3.0"),
        dict(mmcv_lite="2.1.0", mmengine="0.10.7", condattn_mmcv_ext="1.0"),
        dict(onedl_mmcv="2.3.6", onedl_mmengine="0.10.12", onedl_mmsegmentation="1.4.2"),
    ],
    ids=["nothing", "stock", "lite", "default"],
)
def test_one_stack_is_fine(monkeypatch, versions):
    pretend(monkeypatch, **versions)
    stack.check_stack()


def test_mixed_stack(monkeypatch):
    pretend(monkeypatch, mmcv="2.1.0", onedl_mmengine="0.10.12")
    with pytest.raises(
        RuntimeError, match="mixes two stacks: onedl-mmengine 0.10.12 and mmcv 2.1.0.*fresh environment"
    ):
        stack.check_stack()


def test_two_builds_of_mmcv(monkeypatch):
    pretend(monkeypatch, mmcv="2.1.0", mmcv_lite="2.1.0")
    with pytest.raises(RuntimeError, match="has mmcv 2.1.0 and mmcv-lite 2.1.0, which install the same modules"):
        stack.check_stack()


def test_operators_without_an_mmcv(monkeypatch):
    """After mmcv was uninstalled, the rest of its folder can be imported, but is empty."""
    pretend(monkeypatch, condattn_mmcv_ext="1.0", mmengine="0.10.7")
    with pytest.raises(RuntimeError, match="condattn-mmcv-ext is left.*pip uninstall condattn-mmcv-ext"):
        stack.check_stack()


@pytest.mark.parametrize(
    "files, description",
    [
        ([], "no mmcv"),
        (["_ext.py"], "no mmcv"),
        (["__init__.py"], "none: install projects/mmcv_ext"),
        (["__init__.py", "_ext.py"], "condattn's, on torchvision"),
        (["__init__.py", "_ext.py", f"_ext{EXTENSION_SUFFIXES[0]}"], "compiled"),
    ],
    ids=["nothing", "leftover", "pure", "ours", "compiled"],
)
def test_whose_operators(files, description, tmp_path, monkeypatch):
    (tmp_path / "mmcv").mkdir()
    for name in files:
        (tmp_path / "mmcv" / name).touch()
    monkeypatch.delitem(sys.modules, "mmcv", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    pretend(monkeypatch, torchvision="0.26.0")
    assert stack.describe_operators().startswith(description)


@pytest.mark.parametrize("wanted, other", [("default", "mmcv"), ("stock", "onedl-mmcv")])
def test_set_up_refuses_an_environment_with_the_other_stack(wanted, other, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")  # succeeds for every command, so that the other stack seems to be installed
    python.chmod(0o755)
    script = Path(__file__).parents[1] / "requirements" / "install.sh"
    result = subprocess.run(["bash", script, tmp_path / "venv", wanted], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"has the other stack ({other})" in result.stderr


def test_operators_need_a_stack(tmp_path):
    """Nothing is compiled for an environment that does not exist or has no stack."""
    script = Path(__file__).parents[1] / "requirements" / "operators.sh"
    result = subprocess.run(["bash", script, tmp_path / "venv"], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "no environment" in result.stderr
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")  # fails for every command, so that no package seems to be installed
    python.chmod(0o755)
    result = subprocess.run(["bash", script, tmp_path / "venv"], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "has neither onedl-mmengine nor mmengine" in result.stderr


def test_this_environment():
    stack.check_stack()


def test_the_command_of_the_readme(tmp_path):
    command = [sys.executable, "-m", "condattn.stack"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "torch " in output and "mmcv's operators: " in output


PACKAGES = (
    *("timm", "torchvision", "mmengine", "mmcv.ops", "mmdet", "mmseg", "mmpretrain", "transformers"),
    *("pycocotools.mask", "scipy", "skimage", "sklearn", "matplotlib", "rich", "jinja2", "yaml", "tifffile"),
    *("hypothesis", "onnx", "onnxruntime", "onnxscript", "safetensors.torch"),
)
"""What tests need, and are skipped without."""


@pytest.mark.skipif("STACK_TO_TEST" not in os.environ, reason="only the Makefile knows what should be installed")
@pytest.mark.parametrize("package", [*PACKAGES, "peft", "accelerate"])
def test_no_test_is_skipped_for_a_package_that_the_stack_has(package):
    """A package that is installed, but cannot be imported, would be taken for one that is missing."""
    if os.environ["STACK_TO_TEST"] == "stock" and package in ("peft", "accelerate"):
        pytest.skip("no part of the stock stack")
    importlib.import_module(package)


def test_every_model_of_transformers_is_tested():
    """Those that older versions lack are left out; the default stack has all."""
    transformers = pytest.importorskip("transformers")
    if os.environ.get("STACK_TO_TEST") != "default":
        pytest.skip("of the default stack alone")
    zoo = importlib.import_module("zoo_transformers")
    assert zoo.LEFT_OUT == [], transformers.__version__


def test_one_import_registers_everything():
    """Models, data sets, hooks, schedulers and strategies; transforms are named with their modules."""
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    root = Path(stack.__file__).parent
    decorated = re.compile(r"^@(?!TRANSFORMS)\w+\.register_module\(\)", re.MULTILINE)
    files = [path for path in (root / "openmmlab").rglob("*.py") if decorated.search(path.read_text())]
    modules = {".".join(path.relative_to(root.parent).with_suffix("").parts) for path in files}
    assert len(modules) >= 18
    code = "import sys, condattn.registry; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert modules <= set(done.stdout.split())
