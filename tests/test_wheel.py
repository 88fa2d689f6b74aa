"""The wheel contains the whole package, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "projects" / "condattn"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built in a copy of the project because building leaves files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(PACKAGE, folder / "projects" / "condattn", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "projects" / "pretraining").mkdir()
    (folder / "projects" / "pretraining" / "__init__.py").write_text("")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "out",
        ".",
    ]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (folder / "out").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield {name: archive.read(name) for name in archive.namelist()}


def test_it_holds_every_file_of_the_package_and_nothing_else(wheel):
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    expected = {path.relative_to(PACKAGE.parent).as_posix() for path in files}
    assert {name for name in wheel if ".dist-info/" not in name} == expected
    suffixes = {Path(name).suffix for name in expected}
    assert suffixes == {".py", ".html", ".typed"}


def test_its_metadata(wheel):
    name = next(name for name in wheel if name.endswith("METADATA"))
    text = wheel[name].decode()
    import condattn

    for line in ("Name: condattn", f"Version: {condattn.__version__}", "License-Expression: Apache-2.0"):
        assert line in text.splitlines()
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.5"]
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
