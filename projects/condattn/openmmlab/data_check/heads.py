"""Compare the number of classes of a model's heads with that of the data."""

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from ...wording import counted, listed
from ..models.settings import class_name, parts
from .settings import as_list

OTHER_PARTS = ("backbone", "rpn_head", "semantic_head", "seg_head", "panoptic_head", "panoptic_fusion_head")
"""Parts of a model whose ``num_classes`` need not be that of the data."""
STUFF = 53
"""mmdet's default of ``num_stuff_classes``."""
OPEN_HEADS = ("ATSSVLFusionHead", "GroundingDINOHead")
"""Heads with an open vocabulary, which compare objects with words: ``num_classes`` does not limit their classes."""
EDGE_HEAD = "STDCHead"
"""mmseg's head that separates edges from everything else, whatever the classes of the data."""


def check_heads(cfg: Config, classes: list[str]) -> tuple[list[str], list[str]]:
    """Compare the heads of ``cfg.model`` with ``classes``; a single class with a softmax is an error.

    Returns:
        The errors, and the warnings.
    """
    errors, warnings = [], []
    model = cfg.get("model") or {}
    if not classes or _is_open(model):
        return errors, warnings
    for where, head in _heads(model, "model"):
        number = head["num_classes"]
        auxiliary = cfg.get("default_scope") == "mmseg" and "auxiliary_head" in where
        if number != len(classes) and class_name(head) != EDGE_HEAD:
            have = counted(len(classes), "class")
            message = f"{where}.num_classes is {number}, but the data have {have} ({listed(classes)}); set it to that"
            (warnings if auxiliary else errors).append(message)
        elif number == 1 and cfg.get("default_scope") == "mmseg" and _is_softmax(head):
            names = ("background", classes[0])
            errors.append(
                f"{where} has one class, {classes[0]!r}, and a softmax, whose loss is 0 for ever; set "
                f"classes = {names} with num_classes=2, in the label maps too, or num_classes=2, out_channels=1 and "
                "loss_decode.use_sigmoid=True"
            )
    errors += _wrong_things(model, classes)
    return errors, warnings


def _wrong_things(model: Any, classes: list[str]) -> Iterator[str]:
    """Yield mistakes in parts of a model that tell things from stuff, such as the heads of mmdet's Mask2Former.

    Annotations of instances show things alone, so that their classes may or may not include the stuff of label maps.
    """
    for where, head in parts(model, "model"):
        things, stuff = head.get("num_things_classes"), head.get("num_stuff_classes", STUFF)
        if not isinstance(things, int) or not isinstance(stuff, int) or "num_classes" in head:
            continue
        if len(classes) not in (things, things + stuff):
            have = f"{counted(len(classes), 'class')} ({listed(classes)})"
            yield f"{where}.num_things_classes is {things}, but the data have {have}; set it to that"
            continue
        loss = head.get("loss_cls")
        weights = loss.get("class_weight") if isinstance(loss, dict) else None
        if isinstance(weights, list | tuple) and len(weights) != things + stuff + 1:
            expected = f"{things + stuff + 1}, one for each class and one for no object"
            yield f"{where}.loss_cls.class_weight: expected {expected}, found {len(weights)}; write as many"


def _is_open(node: Any) -> bool:
    """Whether a detector has an open vocabulary."""
    if isinstance(node, dict):
        return bool(node.get("language_model")) or class_name(node) in OPEN_HEADS or any(map(_is_open, node.values()))
    return isinstance(node, list | tuple) and any(map(_is_open, node))


def _heads(node: Any, where: str) -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        if isinstance(node.get("num_classes"), int):
            yield where, node
        for key, child in node.items():
            if key not in OTHER_PARTS:
                yield from _heads(child, f"{where}.{key}")
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from _heads(child, f"{where}.{i}")


def _is_softmax(head: dict[str, Any]) -> bool:
    losses = as_list(head.get("loss_decode") or {"type": "CrossEntropyLoss"})
    return all(class_name(loss) == "CrossEntropyLoss" and not loss.get("use_sigmoid") for loss in losses)
