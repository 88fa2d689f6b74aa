"""Predict images that belong to no data set, for detection and segmentation alike."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, VISUALIZERS
from mmengine.structures import BaseDataElement

from ...weights.atomic import write_atomically
from ...wording import listed, one_line
from ..data_check.images import walk
from ..data_check.settings import class_of, leaves
from ..data_check.transforms import image_loader
from ..drawing import drawn_meta
from ..errors import UserError
from ..models.loading import check_conditioning
from ..models.settings import class_name
from .checkpoints import check_fit, drop_pretrained, read_checkpoint
from .launch import build_model

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")

_VISUALIZERS = {"mmdet": "DetLocalVisualizer", "mmseg": "SegLocalVisualizer"}


def find_images(source: Path, out_dir: Path) -> list[tuple[Path, Path]]:
    """Find the images at ``source``, a file or a folder with all its subfolders, in a fixed order.

    Results that an earlier run has written to ``out_dir`` are left out, and so are hidden files and folders, whose
    names begin with a dot.

    Returns:
        Pairs of a path and the path relative to ``source`` (the file name if ``source`` is a file).

    Raises:
        UserError: If there is no such path or no image below it.
    """
    if source.is_file():
        return [(source, Path(source.name))]
    if not source.is_dir():
        raise UserError(f"no image or folder {source}")
    results = [(out_dir / name).resolve() for name in ("vis", "preds")]
    images = [
        (path, path.relative_to(source))
        for path in sorted(Path(folder, name) for folder, names in walk(source) for name in names)
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
        and not any(path.resolve().is_relative_to(folder) for folder in results)
    ]
    if not images:
        raise UserError(f"no image below {source}; expected files with one of the suffixes {' '.join(IMAGE_SUFFIXES)}")
    return images


def image_reader(cfg: Config) -> Callable[[Path], np.ndarray]:
    """A function that reads an image file as the test pipeline of ``cfg`` does.

    Raises:
        UserError: If the pipeline loads no image files.
    """
    load = Compose([image_loader(_image_pipeline(cfg))])
    return lambda path: load({"img_path": str(path), "img_id": 0})["img"]


def unreadable(paths: Iterable[Path], read: Callable[[Path], Any]) -> dict[Path, str]:
    """Those of ``paths`` that ``read`` cannot read as images -> why."""
    reasons = {}
    for path in paths:
        try:
            read(path)
        except Exception as error:  # a transform may raise any error
            reasons[path] = in_short(error)
    return reasons


def in_short(error: Exception) -> str:
    """Type of an error and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {one_line(str(error))[:160]}"


class Predictor:
    """A trained model, the test pipeline of its configuration and a visualizer.

    Args:
        cfg: The configuration.
        checkpoint: File or URL of the weights. If None, the model is initialised without pretrained weights.
        device: Where to predict.
        other_conditioning: Load a checkpoint although its model was conditioned otherwise.
        unsafe: Execute the code in a checkpoint that holds more than weights.
        images: Whether images will be predicted; the configuration needs a test pipeline for that alone.

    Attributes:
        model: The model.
        loaded: Names of the weights that the checkpoint has; the others have initial values.

    Raises:
        UserError: If the model or the checkpoint is invalid, they do not fit each other, or images need what the
            configuration does not have.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: str | None,
        device: torch.device,
        other_conditioning: bool = False,
        unsafe: bool = False,
        images: bool = True,
    ) -> None:
        self._pipeline, self._read = (Compose(_image_pipeline(cfg)), image_reader(cfg)) if images else (None, None)
        model, state = build_model(cfg), {}
        self.loaded = set()
        if checkpoint is None:
            drop_pretrained(model, replaced=set(model.state_dict()))
            model.init_weights()
        else:
            state = read_checkpoint(checkpoint, unsafe)
            weights = check_fit(state, checkpoint, model)
            if not other_conditioning:
                check_conditioning(state, checkpoint, model)
            model.load_state_dict(weights, strict=False)
            self.loaded = set(weights)
        self.model = revert_sync_batchnorm(model).to(device).eval()
        self._segments = cfg.default_scope == "mmseg"
        if images:
            self._visualizer = _build_visualizer(cfg, _drawn_classes(cfg, state.get("meta") or {}))

    @torch.inference_mode()
    def predict(self, paths: Iterable[Path]) -> list[BaseDataElement]:
        """Predict a batch of image files; return one data sample per image, on the CPU."""
        return self.run(paths)

    def predict_each(self, paths: Sequence[Path]) -> list[BaseDataElement | Exception]:
        """Predict like :meth:`predict`, but return the error in place of the result of an image that fails.

        If a batch fails, its images are predicted one by one.
        """
        try:
            return self.predict(paths) if paths else []
        except Exception as error:  # a model or a transform may raise any error
            if len(paths) == 1:
                return [error]
            return [result for path in paths for result in self.predict_each([path])]

    def run(self, paths: Iterable[Path]) -> list[BaseDataElement]:
        """Predict like :meth:`predict`, but in the caller's gradient mode."""
        inputs = [self._pipeline({"img_path": str(path), "img_id": index}) for index, path in enumerate(paths)]
        return [sample.cpu() for batch in self._batches(inputs) for sample in self.model.test_step(batch)]

    def draw(self, sample: BaseDataElement, out_file: Path, score_thr: float) -> None:
        """Draw a prediction on its image; boxes and masks only if their score is at least ``score_thr``."""
        image = self._picture(sample.img_path)
        threshold = {} if self._segments else {"pred_score_thr": score_thr}
        out_file.parent.mkdir(parents=True, exist_ok=True)
        self._visualizer.add_datasample(
            out_file.name, image, sample, draw_gt=False, out_file=str(out_file), **threshold
        )

    def _picture(self, path: str) -> np.ndarray:
        """The image at ``path`` in RGB; if only the pipeline can read it, its first channels, stretched to 8 bits."""
        try:
            return mmcv.imread(path, channel_order="rgb")
        except cv2.error:
            image = np.atleast_3d(self._read(Path(path))).astype(float)
        image = image[..., :3] if image.shape[2] > 2 else image[..., [0, 0, 0]]
        low, high = image.min(), image.max()
        return (255 * (image - low) / max(high - low, 1e-9)).astype(np.uint8)

    def _batches(self, inputs: list[dict]) -> Iterator[dict]:
        # mmseg needs images of one size in a batch; mmdet pads them to a common size.
        groups = groupby(inputs, key=lambda item: item["inputs"].shape if self._segments else None)
        return (pseudo_collate(list(group)) for _, group in groups)


def save_prediction(sample: BaseDataElement, out_file: Path) -> None:
    """Save the prediction for one image as plain data.

    Instances go to ``out_file`` + '.json': labels (indices of classes), scores, boxes (x1, y1, x2, y2 in
    pixels) and masks (COCO run lengths). A label map goes to ``out_file`` + '.png', with indices of classes.

    Raises:
        UserError: If the model predicts neither.
    """
    if not {"pred_sem_seg", "pred_instances"} & set(sample.keys()):
        raise UserError(f"expected a model that predicts instances or a label map, found {', '.join(sample.keys())}")
    out_file.parent.mkdir(parents=True, exist_ok=True)
    if "pred_sem_seg" in sample:
        labels = sample.pred_sem_seg.data.squeeze(0).numpy()
        dtype = np.uint8 if labels.max() < 256 else np.uint16
        mmcv.imwrite(labels.astype(dtype), f"{out_file}.png")
    if "pred_instances" in sample:
        text = json.dumps(_instances(sample.pred_instances))
        write_atomically(f"{out_file}.json", lambda path: path.write_text(text), overwrite=True)


def _instances(instances: BaseDataElement) -> dict:
    result = {key: instances[key].tolist() for key in ("labels", "scores", "bboxes") if key in instances}
    if "masks" in instances:
        from mmdet.structures.mask import encode_mask_results

        masks = encode_mask_results(instances.masks.numpy())
        result["masks"] = [{**mask, "counts": mask["counts"].decode()} for mask in masks]
    return result


def _image_pipeline(cfg: Config) -> list[dict]:
    """The test pipeline without loading annotations, which new images do not have.

    Raises:
        UserError: If there is none, or it loads no image files.
    """
    dataset = (cfg.get("test_dataloader") or {}).get("dataset")
    if not dataset:
        raise UserError(f"{cfg.filename} has no test_dataloader, whose pipeline prepares images; add one")
    pipeline = next(leaves(dataset)).get("pipeline") or []
    if image_loader(pipeline) is None:
        raise UserError(
            f"{cfg.filename}: expected a test pipeline that loads image files, found "
            f"{listed(map(class_name, pipeline)) or 'none'}; without images, spectra.py measures weights, and "
            "CalibrationHook calibrates when a training starts"
        )
    return [step for step in copy.deepcopy(pipeline) if "Annotations" not in class_name(step)]


def _drawn_classes(cfg: Config, meta: dict) -> dict:
    """Names and colours of the classes: those in the ``meta`` of a checkpoint, else those of the test data of ``cfg``.

    mmdet 2 and mmseg 0 wrote them into ``meta`` itself.
    """
    trained = drawn_meta(meta.get("dataset_meta") or meta)
    return trained if trained.get("classes") else drawn_meta(_dataset_meta(cfg.test_dataloader.dataset))


def _dataset_meta(dataset: dict) -> dict:
    """Class names and colours of a data set that need not exist: from its class, overridden by the configuration."""
    dataset = next(leaves(dataset))
    return {**getattr(class_of(dataset, DATASETS), "METAINFO", {}), **(dataset.get("metainfo") or {})}


def _build_visualizer(cfg: Config, meta: dict):
    settings = copy.deepcopy(cfg.get("visualizer") or {"type": _VISUALIZERS[cfg.default_scope]})
    settings.pop("vis_backends", None)
    settings.setdefault("name", "predictions")
    visualizer = VISUALIZERS.build(settings)
    visualizer.dataset_meta = meta
    return visualizer
