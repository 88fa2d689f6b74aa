"""The wheel contains the whole package, and nothing else."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "projects" / "condattn"


FOLDERS = ("configs", "docs", "projects", "requirements", "results", "tests", "tools")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built in a copy of the project because building leaves files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
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


def test_the_source_distribution_holds_what_the_readme_names(tmp_path):
    """All folders, without what running leaves in them."""
    left = ("__pycache__", "build", "*.egg-info", "*.part")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(*left))
    for path in (path for path in ROOT.iterdir() if path.is_file() and path.suffix != ".part"):
        shutil.copy(path, tmp_path / path.name)
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('out')"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (tmp_path / "out").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {path.relative_to(tmp_path) for name in FOLDERS for path in (tmp_path / name).rglob("*") if path.is_file()}
    expected = {file.as_posix() for file in files if not any(part.endswith(".egg-info") for part in file.parts)}
    assert expected <= names
    assert {"Makefile", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= names
    assert not any("__pycache__" in name for name in names)
