"""The shipped configurations of whole models, with fewer layers, smaller images, no pretrained weights."""

from mmengine.config import Config
from runs import CONFIGS

NAMES = ("detr_r50_pc", "dino-4scale_r50_pc", "mask2former_swin_pc", "mask2former_swin_pc_ade20k")
FEW = {"num_layers": 2, "num_queries": 20, "max_per_img": 10, "num_points": 64, "nms_pre": 50}


def nodes(node):
    """Yield every dictionary in ``node``, including itself."""
    if isinstance(node, dict):
        yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    for child in children:
        yield from nodes(child)


def small(name: str, size: int = 64) -> Config:
    """Load the configuration ``name`` and shrink it; images get ``size`` pixels."""
    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    for node in nodes(cfg.model):
        node.update({key: value for key, value in FEW.items() if isinstance(node.get(key), int)})
        if (node.get("init_cfg") or {}).get("type") == "Pretrained":
            node.init_cfg = None
        if node.get("type") == "ResNet":
            node.update(depth=18)
        if node.get("type") == "ChannelMapper":
            node.in_channels = [channels // 4 for channels in node.in_channels]
        if node.get("type") == "SwinTransformer":
            node.depths = (1, 1, 1, 1)
    for node in nodes([cfg.model, cfg.test_dataloader, cfg.train_dataloader]):
        for key in ("scale", "size", "crop_size"):
            if key in node and node.get("type") != "RandomChoiceResize":
                node[key] = (size, size)
    return cfg
