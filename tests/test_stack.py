"""Mixed stacks are refused with one clear line."""

import subprocess
from importlib import metadata
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
        dict(onedl_mmcv="2.3.6", onedl_mmengine="0.10.12", onedl_mmsegmentation="1.4.2"),
    ],
    ids=["nothing", "stock", "default"],
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


@pytest.mark.parametrize("wanted, other", [("default", "mmcv"), ("stock", "onedl-mmcv")])
def test_set_up_refuses_an_environment_with_the_other_stack(wanted, other, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")  # says yes to everything, also to having the other stack
    python.chmod(0o755)
    script = Path(__file__).parents[1] / "requirements" / "install.sh"
    result = subprocess.run(["bash", script, tmp_path / "venv", wanted], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"has the other stack ({other})" in result.stderr


def test_this_environment():
    stack.check_stack()
