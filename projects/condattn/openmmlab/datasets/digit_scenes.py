"""The built-in demo data: real handwritten digits on real photographs, made offline in seconds.

The digits are scikit-learn's 1,797 scans (8 x 8 pixels, 16 grey levels), the photographs those that ship
inside the scikit-learn and scikit-image wheels. A scene is a random crop of a photograph with a few digits on
it at random place, size, rotation and colour. Later digits occlude earlier ones; a mask is what remains
visible. The training and the validation scenes share no scan and no photograph.

One copy of the images serves two layouts::

    root/images/{training,validation}/000000.jpg
    root/annotations/instances_{training,validation}.json   COCO: boxes, and masks as run lengths
    root/annotations/{training,validation}/000000.png       ADE20K-like: 0 background, 1 + d the digit d
    root/digit_scenes.json                                  the parameters the folder was written with

Background is a class that is learned and counted, so 0 is a label as every other (mmseg's
`reduce_zero_label=False`); in ADE20K itself 0 means "not annotated".
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

CLASSES = tuple("0123456789")
PALETTE = [
    (230, 25, 75),
    (60, 180, 75),
    (0, 130, 200),
    (255, 225, 25),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (170, 110, 40),
    (0, 0, 128),
]
"""One RGB colour per digit, far apart from each other."""

PHOTOGRAPHS = {
    "training": {
        "skimage.data": (
            "astronaut.png",
            "camera.png",
            "chelsea.png",
            "grass.png",
            "hubble_deep_field.jpg",
            "motorcycle_left.png",
            "rocket.jpg",
        ),
        "sklearn.datasets.images": ("china.jpg",),
    },
    "validation": {
        "skimage.data": ("coffee.png", "gravel.png"),
        "sklearn.datasets.images": ("flower.jpg",),
    },
}
"""split -> package -> the photographs that its wheel contains (scikit-image 0.22 to 0.26 agree)."""

MARKER = "digit_scenes.json"
FORMAT = 1
DIGITS_PER_SCENE = (2, 5)
DIGIT_HEIGHT = (0.27, 0.45)
"""Smallest and largest digit, as a fraction of the scene's side, before rotation."""
MAX_ROTATION = 20.0
"""Maximum rotation of a digit in degrees, in either direction."""
MAX_OVERHANG = 0.1
"""Maximum fraction of a digit's side that may lie outside the scene."""
MIN_VISIBLE = 0.75
"""A digit is placed only where every digit, itself included, keeps this fraction of its pixels visible."""
BACKGROUND_BRIGHTNESS = 0.6
"""The photographs are multiplied by this, so that the bright digits stand out."""
SHADOW, SHADOW_WIDTH = 1.5, 0.015
"""Strength of the shadow around a digit, and its width as a fraction of the scene's side."""
VALIDATION_SCANS = 0.2
"""Fraction of the scans that only the validation scenes use."""


def write_digit_scenes(
    root: str | os.PathLike, train: int = 3000, val: int = 200, size: int = 192, seed: int = 0
) -> Path:
    """Write the digit scenes, unless `root` already holds exactly these.

    The same arguments give the same files, byte for byte. The folder appears in one step when everything in
    it is written, so that it is never seen half-written, and several processes may call this at once.

    Args:
        root: the folder to write, for instance `data/digit_scenes`; its parents are created.
        train: number of training scenes.
        val: number of validation scenes.
        size: width and height of a scene in pixels, at least 48.
        seed: seed of all random numbers.

    Returns:
        `root` as a path.

    Raises:
        ValueError: a count below 1, a size below 48 or a negative seed.
        FileExistsError: `root` holds something else; the message says what to delete.

    """
    for name, value, least in (("train", train, 1), ("val", val, 1), ("size", size, 48), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"digit scenes: {name} must be at least {least}, got {value}")
    root = Path(root)
    parameters = {"format": FORMAT, "train": train, "val": val, "size": size, "seed": seed}
    if root.exists():
        return _check_existing(root, parameters)

    root.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{root.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root.parent, ignore_cleanup_errors=True) as scratch:
        finished = Path(scratch, root.name)
        _write_split(finished, "training", train, size, seed)
        _write_split(finished, "validation", val, size, seed)
        (finished / MARKER).write_text(json.dumps(parameters) + "\n")
        try:
            finished.rename(root)
        except OSError:
            if not root.exists():
                raise
            _check_existing(root, parameters)  # another process was first: ours is discarded
    return root


def ensure_digit_scenes(root: str | os.PathLike) -> Path:
    """Return `root`: the digit scenes that are there, whatever their parameters, or else the default ones.

    Raises:
        FileExistsError: `root` holds something that is no finished set of digit scenes.

    """
    root = Path(root)
    return root if _parameters(root) else write_digit_scenes(root)


def _parameters(root: Path) -> dict | None:
    """Return the parameters a finished folder was written with, None if it is no such folder."""
    try:
        parameters = json.loads((root / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return parameters if parameters.get("format") == FORMAT else None


def _check_existing(root: Path, wanted: dict) -> Path:
    found = _parameters(root)
    if found is None:
        raise FileExistsError(f"{root} exists but holds no finished digit scenes: delete it or name another folder")
    if found != wanted:
        differs = ", ".join(f"{k} {found.get(k)} instead of {v}" for k, v in wanted.items() if found.get(k) != v)
        raise FileExistsError(
            f"{root} holds digit scenes with other parameters ({differs}): delete it or name another folder"
        )
    return root


def _write_split(root: Path, split: str, count: int, size: int, seed: int) -> None:
    import numpy as np
    from PIL import Image
    from pycocotools import mask as rle
    from tqdm import tqdm

    scans = _scans(split, seed)
    photographs = _photographs(split)
    image_dir, label_dir = root / "images" / split, root / "annotations" / split
    image_dir.mkdir(parents=True)
    label_dir.mkdir(parents=True)
    images, annotations = [], []
    for index in tqdm(range(count), desc=f"digit scenes, {split}", unit="scene"):
        # With a generator of its own a scene does not depend on the scenes before it.
        rng = np.random.default_rng([seed, list(PHOTOGRAPHS).index(split), index])
        name = list(photographs)[rng.integers(len(photographs))]
        scene, owner, digits = _compose(rng, photographs[name], scans, size)
        stem = f"{index:06d}"
        Image.fromarray(scene).save(image_dir / f"{stem}.jpg", quality=95, subsampling=0)
        labels = np.array([0] + [digit + 1 for digit, _ in digits], np.uint8)
        Image.fromarray(labels[owner]).save(label_dir / f"{stem}.png")
        images.append({"id": index, "file_name": f"{stem}.jpg", "width": size, "height": size, "photograph": name})
        for number, (digit, scan) in enumerate(digits, start=1):
            mask = rle.encode(np.asfortranarray(owner == number, np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": digit + 1,
                    "bbox": rle.toBbox(mask).tolist(),
                    "area": int(rle.area(mask)),
                    "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
                    "iscrowd": 0,
                    "scan": scan,
                }
            )
    categories = [{"id": digit + 1, "name": name} for digit, name in enumerate(CLASSES)]
    content = {
        "info": {"description": "handwritten digits (scikit-learn) on photographs (scikit-learn, scikit-image)"},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _scans(split: str, seed: int) -> list[tuple[int, int, object]]:
    """Return the split's scans: (digit, index among scikit-learn's scans, 8 x 8 array from 0 to 16)."""
    import numpy as np
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    held_out = round(VALIDATION_SCANS * len(order))
    chosen = order[:held_out] if split == "validation" else order[held_out:]
    return [(int(data.target[i]), int(i), data.images[i]) for i in chosen]


def _photographs(split: str) -> dict:
    """Return file name -> RGB PIL image, read from the installed wheels: nothing is ever downloaded."""
    from importlib.resources import files

    from PIL import Image

    found = {}
    for package, names in PHOTOGRAPHS[split].items():
        for name in names:
            with (files(package) / name).open("rb") as file:
                found[name] = Image.open(file).convert("RGB")
    return found


def _compose(rng, photograph, scans, size: int):
    """Make one scene.

    Returns:
        The image (size, size, 3) in uint8; for each pixel the number of the visible digit, counted from 1, or 0 for
        none (size, size); and a list of (digit, scan index) for the numbers from 1 on.

    """
    import numpy as np
    from PIL import Image

    shorter = min(photograph.size)
    side = int(rng.integers(min(size, shorter), shorter + 1))
    left, top = (int(rng.integers(extent - side + 1)) for extent in photograph.size)
    crop = photograph.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    scene = BACKGROUND_BRIGHTNESS * np.asarray(crop, np.float32)
    owner = np.zeros((size, size), np.uint8)
    digits, drawn = [], [0]
    for _ in range(rng.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1)):
        digit, scan_index, scan = scans[rng.integers(len(scans))]
        alpha = _render(scan, size * rng.uniform(*DIGIT_HEIGHT), rng.uniform(-MAX_ROTATION, MAX_ROTATION))
        for _attempt in range(10):
            layer = _place(rng, alpha, size)
            candidate = np.where(layer >= 0.5, len(digits) + 1, owner)
            total = [*drawn, int((alpha >= 0.5).sum())]
            if (np.bincount(candidate.ravel(), minlength=len(total)) >= MIN_VISIBLE * np.array(total)).all():
                scene = _paint(scene, layer, _colour(rng))
                owner, drawn = candidate.astype(np.uint8), total
                digits.append((digit, scan_index))
                break
    return scene.round().clip(0, 255).astype(np.uint8), owner, digits


def _render(scan, height: float, angle: float):
    """Return the scan's opacity, 0 to 1, resampled to `height` pixels, rotated and cropped to its extents."""
    import numpy as np
    from PIL import Image

    padded = np.pad(scan / 16, 1).astype(np.float32)  # room for the strokes that touch the scan's border
    side = round(height * len(padded) / len(scan))
    image = Image.fromarray(padded).resize((side, side), Image.Resampling.BICUBIC)
    grey = np.asarray(image.rotate(angle, Image.Resampling.BICUBIC, expand=True))
    alpha = ((grey - 0.5) * height / 8 + 0.5).clip(0, 1)  # an edge of about a pixel at every height
    rows, columns = (np.flatnonzero((alpha >= 0.5).any(axis)) for axis in (1, 0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(rng, alpha, size: int):
    """Return `alpha` at a random place on a (size, size) canvas, at most MAX_OVERHANG of a side outside."""
    import numpy as np

    margin = int(MAX_OVERHANG * max(alpha.shape))
    canvas = np.zeros((size + 2 * margin, size + 2 * margin), np.float32)
    top, left = (int(rng.integers(extent - n + 1)) for extent, n in zip(canvas.shape, alpha.shape, strict=True))
    canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]] = alpha
    return canvas[margin : margin + size, margin : margin + size]


def _colour(rng):
    """Return a random bright RGB colour, 0 to 255."""
    from colorsys import hsv_to_rgb

    return [255 * value for value in hsv_to_rgb(rng.uniform(), rng.uniform(0.1, 0.7), rng.uniform(0.85, 1))]


def _paint(scene, layer, colour):
    """Return `scene` with `colour` where `layer` is 1, and a soft shadow around it."""
    from scipy.ndimage import gaussian_filter

    shaded = scene * (1 - SHADOW * gaussian_filter(layer, SHADOW_WIDTH * len(layer)).clip(0, 0.5)[..., None])
    return shaded + (colour - shaded) * layer[..., None]
