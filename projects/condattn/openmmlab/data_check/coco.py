"""Check an annotation file in COCO's format, and its images, as mmdet's CocoDataset will use them."""

import gc
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ...wording import counted, shown
from ..errors import UserError
from .annotations import Annotations
from .findings import Findings, write_cached
from .images import check_images
from .shapes import check_boxes, check_masks
from .usage import CocoUse, Usage


def check_coco(use: CocoUse) -> tuple[Findings, list[str]]:
    """Check annotations and images.

    The garbage collector is disabled meanwhile: it takes a third of the time for a large file, whose objects form no
    cycles.

    Returns:
        The findings, and the files and folders that were read.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _check_coco(use)
    finally:
        if enabled:
            gc.enable()


def _check_coco(use: CocoUse) -> tuple[Findings, list[str]]:
    findings = Findings(with_masks=use.with_masks)
    read = [use.ann_file, *use.data_files]
    try:
        content, repairs = read_annotations(use.ann_file, needs_objects=use.needs_objects)
        table = Annotations(content, use.ann_file, use.classes)
        findings.warnings += check_boxes(table)
        usage = Usage(table, use)
        if use.with_masks:
            findings.warnings += check_masks(table, usage.masked)
        if use.data_files:
            _compare_images(table, use)
        else:
            usage.summarize(findings)
    except UserError as error:
        findings.errors.append(str(error))
        return findings, read
    if not use.data_files:
        paths = [os.path.join(use.folder, table.images[i]["file_name"]) for i in usage.kept]
        sizes = [(int(table.widths[i]), int(table.heights[i])) for i in usage.kept]
        read += check_images(findings, paths, sizes, use.read_all, look=use.plain_images)
    if not findings.errors:
        read += repair(findings, use.ann_file, content, [*repairs, *table.repairs])
    return findings, read


def _compare_images(table: Annotations, use: CocoUse) -> None:
    """Raise a UserError unless the images are those of one data set or those of all data sets together."""
    every = set()
    for path in use.data_files:
        content, _ = read_annotations(path, needs_objects=False)
        ids = set(Annotations({**content, "annotations": []}, path, use.classes).places)
        if ids == set(table.places):
            return
        every |= ids
    more, fewer = set(table.places) - every, every - set(table.places)
    if more or fewer:
        table.fail(
            f"{counted(len(more), 'image is')} not in the data that are evaluated, and {len(fewer)} of theirs not "
            f"here, such as image {shown(next(iter(more or fewer)))}; the evaluator expects the images of "
            f"{Path(use.data_files[0])}: set its ann_file to that"
        )


def read_annotations(path: str, needs_objects: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Read an annotation file.

    Args:
        path: Path of the file.
        needs_objects: Whether the file must have a list of annotations.

    Returns:
        The content of the file, and descriptions of what was repaired to read it.

    Raises:
        UserError: If the file is not JSON, or lacks one of COCO's three lists.
    """
    try:
        data = Path(path).read_bytes()
        encoding = json.detect_encoding(data)
        content = json.loads(data)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected an annotation file in COCO's format"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON file: {error}; expected COCO's format: export it anew") from error
    if isinstance(content, dict) and not needs_objects:
        content.setdefault("annotations", [])
    for name in ("images", "annotations", "categories"):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: expected COCO's format, with a list of objects named {name!r}; export it anew")
    plain = encoding == "utf-8"
    return content, [] if plain else [f"its encoding {encoding.removesuffix('-sig').upper()} was made plain UTF-8"]


def repair(findings: Findings, path: str, content: dict[str, Any], repairs: list[str]) -> list[str]:
    """Write a repaired copy of an annotation file and report it in ``findings``.

    Returns:
        A list with the path of the copy; empty if there is none.
    """
    if not repairs:
        return []
    try:
        stat = os.stat(path)
        key = hashlib.sha256(f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
        name = f"annotations/{Path(path).stem[:80]}-{key}.json"
        findings.ann_file = str(write_cached(name, lambda partial: partial.write_text(json.dumps(content))))
    except OSError as error:
        findings.errors.append(
            f"{path}: {'; '.join(repairs)}, but the copy cannot be written ({error.strerror or error}); set "
            "XDG_CACHE_HOME to a folder that can be written, or repair the file"
        )
        return []
    findings.warnings.append(f"{path}: {'; '.join(repairs)}, in a copy that is read in its place: {findings.ann_file}")
    return [findings.ann_file]
