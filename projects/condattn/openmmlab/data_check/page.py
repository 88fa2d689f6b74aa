"""Write a web page with the findings of a data check: counts, sizes, and samples with their annotations drawn."""

import warnings
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import VISUALIZERS
from PIL import Image

from ..drawing import drawn_meta
from .check import Checked, build_dataset
from .sampling import any_size
from .transforms import image_loader

TEMPLATE = Path(__file__).with_name("page.html")
WIDTH = 480
"""Maximum width of the pictures, in pixels."""
PARTS = {
    "mmdet": ("DetLocalVisualizer", [{"type": "LoadAnnotations", "with_bbox": True}, {"type": "PackDetInputs"}]),
    "mmseg": ("SegLocalVisualizer", [{"type": "LoadAnnotations"}, {"type": "PackSegInputs"}]),
}
"""Toolbox -> its visualizer, and the transforms that load annotations for it."""


def write_page(cfg: Config, checked: list[Checked], folder: Path) -> Path:
    """Write ``index.html`` and pictures of samples into ``folder``; return the path of the page.

    Args:
        cfg: The configuration, adapted to the findings.
        checked: The findings.
        folder: Output folder; created if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        {} if entry.findings.errors or not entry.findings.classes else _draw_samples(cfg, entry, folder, number)
        for number, entry in enumerate(checked, 1)
    ]
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    path = folder / "index.html"
    text = page.render(config=Path(cfg.filename).name, entries=list(zip(checked, samples, strict=True)))
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _draw_samples(cfg: Config, entry: Checked, folder: Path, number: int) -> dict[str, list[tuple[str, str]]]:
    """Draw samples of a data set, and save them as pictures in ``folder``.

    ``number`` is the number of the data set, which the file names of the pictures contain.

    Returns:
        Name of a class -> pairs of the file name of a picture and that of the image that it shows.
    """
    kind, annotations = PARTS[cfg.default_scope]
    settings: dict[str, Any] = entry.settings
    if cfg.default_scope == "mmdet" and entry.findings.with_masks:
        annotations = [{**annotations[0], "with_mask": True}, *annotations[1:]]
    loading = image_loader(settings.get("pipeline")) or {"type": "LoadImageFromFile"}
    dataset = build_dataset(settings, pipeline=[])
    dataset.pipeline = Compose([loading, *annotations])
    places = {dataset.get_data_info(i)["img_path"]: i for i in range(len(dataset))}
    visualizer = VISUALIZERS.build({"type": kind, "name": f"{entry.label} of the data check"})
    # Matplotlib reads text between dollar signs as formulas.
    names = [name.replace("$", r"\$") for name in dataset.metainfo["classes"]]
    visualizer.dataset_meta = drawn_meta({**dataset.metainfo, "classes": names})
    pictures: dict[str, str] = {}
    for path in sorted({path for counted in entry.findings.classes for path in counted.examples}):
        sample = dataset[places[path]]
        name = f"{entry.loader}_{number}_{places[path]}.png"
        image = sample["inputs"].numpy().transpose(1, 2, 0)
        if cfg.default_scope == "mmdet":
            gt = sample["data_samples"].gt_instances
            gt.bboxes = getattr(gt.bboxes, "tensor", gt.bboxes)
        image = np.ascontiguousarray(image[..., ::-1])
        with warnings.catch_warnings():  # about boxes and texts that extend beyond the image
            warnings.simplefilter("ignore", UserWarning)
            visualizer.add_datasample(name, image, sample["data_samples"], draw_pred=False, out_file=str(folder / name))
        with any_size(), Image.open(folder / name) as picture:
            picture.load()
        picture.thumbnail((WIDTH, 2 * WIDTH))
        picture.save(folder / name)
        pictures[path] = name
    return {
        counted.name: [(pictures[path], Path(path).name) for path in counted.examples]
        for counted in entry.findings.classes
    }
