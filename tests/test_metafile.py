"""configs/metafile.yml lists every config of the model zoo, and agrees with the configs and the table of README.md."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
INDEX = yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]
COLLECTIONS, MODELS = {}, {}
for file in INDEX:
    content = yaml.safe_load((ROOT / file).read_text())
    COLLECTIONS |= {one["Name"]: one for one in content["Collections"]}
    MODELS |= {one["Config"]: one for one in content["Models"]}
METHODS = {"pc": ("Preconditioned Attention", "2603.27153"), "sc": ("Spectral Conditioning", "2603.07162")}


def table() -> set[str]:
    """The configs in the tables of configs/README.md."""
    rows = re.findall(r"^\| \[(.+?\.py)\].*$", (ROOT / "configs" / "README.md").read_text(), re.MULTILINE)
    return {f"configs/{name}" for name in rows}


def test_every_config_is_listed_once():
    names = [one["Name"] for file in INDEX for one in yaml.safe_load((ROOT / file).read_text())["Models"]]
    assert len(names) == len(set(names)) == len(MODELS)
    assert set(MODELS) == {str(file.relative_to(ROOT)) for file in ROOT.glob("configs/*.py")} == table()
    assert all(Path(config).stem == model["Name"] for config, model in MODELS.items())


@pytest.mark.parametrize("config", MODELS)
def test_an_entry_says_what_the_config_does(config):
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    from mmengine.config import Config

    model, cfg = MODELS[config], Config.fromfile(ROOT / config)
    method = next(name for name in METHODS if f"_{name}" in model["Name"])
    collection, paper = METHODS[method]
    assert model["In Collection"] == collection
    assert COLLECTIONS[collection]["Paper"]["URL"].endswith(paper)
    assert (ROOT / COLLECTIONS[collection]["README"]).exists()
    metadata = model["Metadata"]
    length = {"Epochs": cfg.train_cfg.get("max_epochs"), "Iterations": cfg.train_cfg.get("max_iters")}
    assert {name: metadata.get(name) for name in length} == length
    assert metadata["Training Data"] == {"mmdet": "COCO", "mmseg": "ADE20K"}[cfg.default_scope]
    assert metadata["Training Techniques"] == [cfg.optim_wrapper.optimizer.type]
