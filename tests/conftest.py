"""Fixtures of the whole test suite; the demo models are trained once and shared by all tests."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from registrations import registrations_undone
from runs import CONFIGS, DEMO, LOADERS, Run, error_lines, load_tool, train

settings.register_profile("reproducible", derandomize=True, database=None)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def seed():
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Give this process and its children a separate cache folder."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def environment():
    """Take away what the environment of the developer says about data, downloads and processes."""
    names = ("CAMVID", "NUCLEI", "FASHION_MNIST", "LRA_DATA", "LISTOPS_SMALL", "IMAGE_FOLDER", "LANGUAGE_MODEL_TEXT")
    with pytest.MonkeyPatch.context() as monkeypatch:
        launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK")
        git = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY")  # which git sets for its hooks
        for name in (*names, *launchers, *git, "GPUS", "GPUS_PER_NODE", "CPUS_PER_TASK", "SRUN_ARGS", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def registrations():
    """Undo the registrations of rules and methods that a test makes."""
    with registrations_undone():
        yield


@pytest.fixture
def float64():
    """Run a test in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A handful of digit scenes."""
    from condattn.openmmlab.datasets.digit_scenes import write_digit_scenes

    return write_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", train=8, val=4)


@pytest.fixture(scope="session")
def small(scenes) -> list[str]:
    """Options for runs that take seconds: a handful of scenes, no worker processes."""
    options = ["default_hooks.logger.interval=1"]
    for loader in LOADERS:
        options += [
            f"{loader}_dataloader.dataset.data_root={scenes}",
            f"{loader}_dataloader.batch_size=4",
            f"{loader}_dataloader.num_workers=0",
            f"{loader}_dataloader.persistent_workers=False",
        ]
    return options


@pytest.fixture(scope="session")
def detection_options(small, scenes) -> list[str]:
    """Options for a demo detector: one epoch of two iterations."""
    ann_file = scenes / "annotations" / "instances_validation.json"
    return [
        *small,
        f"val_evaluator.ann_file={ann_file}",
        f"test_evaluator.ann_file={ann_file}",
        "train_cfg.max_epochs=1",
        "train_cfg.val_interval=1",
    ]


@pytest.fixture(scope="session")
def segmentation_options(small) -> list[str]:
    """Options for the demo segmenter: two iterations."""
    return [*small, "train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]


@pytest.fixture(scope="session")
def detection(detection_options, tmp_path_factory) -> Run:
    """The demo detector, trained by tools/train.py."""
    folder = tmp_path_factory.mktemp("detection")
    return train(DEMO / "mask_rcnn_swin_pc.py", detection_options, folder, "epoch_1.pth")


@pytest.fixture(scope="session")
def segmentation(segmentation_options, tmp_path_factory) -> Run:
    """The demo segmenter, trained by tools/train.py."""
    folder = tmp_path_factory.mktemp("segmentation")
    return train(DEMO / "upernet_swin_pc.py", segmentation_options, folder, "iter_2.pth")


@pytest.fixture
def coco(tmp_path):
    """A small data set with COCO annotations, which tests can damage."""
    from data_sets import Coco

    return Coco(tmp_path)


@pytest.fixture
def label_maps(tmp_path):
    """A small data set with label maps, which tests can damage."""
    from data_sets import LabelMaps

    return LabelMaps(tmp_path)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call a tool in this process, from an empty folder; return its status, output and errors.

    Keywords replace what the tool's module defines.
    """
    from condattn.openmmlab.errors import run_tool

    monkeypatch.chdir(tmp_path)

    def call(tool: str, *arguments, **replaced) -> tuple[int, str, str]:
        module = load_tool(tool)
        vars(module).update(replaced)
        monkeypatch.setenv("LOCAL_RANK", "0")  # which the tools set
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_tool(module.main)
        return exit_.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refuse(call, tmp_path):
    """Call a tool with bad input; expect status 2, a one-line error that contains ``parts``, and no new files."""

    def refuse(tool: str, *arguments, parts: tuple[str, ...]):
        before = sorted(tmp_path.rglob("*"))
        status, _, errors = call(tool, *arguments)
        assert status == 2
        (line,) = error_lines(errors)
        assert all(part in line for part in parts), line
        assert sorted(tmp_path.rglob("*")) == before

    return refuse


@pytest.fixture
def study_file(tmp_path):
    """A function that writes a study with changed settings, beside its configuration."""
    from tiny_study import TINY

    (tmp_path / "_base_").mkdir()
    shutil.copy(CONFIGS / "studies" / "_base_" / "vit_fashion_mnist.py", tmp_path / "_base_")

    def write(*changes: tuple[str, str]) -> str:
        text = TINY
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "tiny.py").write_text(text)
        return str(tmp_path / "tiny.py")

    return write


@pytest.fixture
def study_images(tmp_path, monkeypatch) -> Path:
    """Folder of the data of the study that :func:`study_file` writes."""
    from tiny_study import write_images

    folder = write_images(tmp_path / "images")
    monkeypatch.setenv("FASHION_MNIST", str(folder))
    return folder
