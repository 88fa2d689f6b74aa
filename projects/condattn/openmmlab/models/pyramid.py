"""A feature pyramid computed from a single feature map, for backbones with one scale."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d


def rescale(channels: int, scale: float) -> tuple[nn.Module, int]:
    """Build a module that scales a map by 4, 2, 1 or 1/2; return it and its output channels (ViTDet, section 3).

    Raises:
        ValueError: If ``scale`` is none of these.
    """
    half, quarter = channels // 2, channels // 4
    if scale == 4:
        first, second = nn.ConvTranspose2d(channels, half, 2, 2), nn.ConvTranspose2d(half, quarter, 2, 2)
        return nn.Sequential(first, LayerNorm2d(half), nn.GELU(), second), quarter
    if scale == 2:
        return nn.ConvTranspose2d(channels, half, 2, 2), half
    if scale == 1:
        return nn.Identity(), channels
    if scale == 0.5:
        return nn.MaxPool2d(2, 2), channels
    raise ValueError(f"SimpleFeaturePyramid: scale is {scale}; expected 4, 2, 1 or 0.5")


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """ViTDet's pyramid (arXiv 2203.16527, section 3): every level from the last map of a single-scale backbone.

    Shape: The input is a sequence of maps, of which only the last, (B, ``in_channels``, H, W), is used. The output is
    ``num_outs`` maps of ``out_channels`` channels: one of size H x W times each of ``scales``, rounded down, then
    further ones, each of half the size of the one before.

    Args:
        in_channels: Number of channels of the map.
        out_channels: Number of channels of each level.
        num_outs: Number of levels; those beyond ``scales`` are subsampled from the last one, as in FPN.
        scales: Size of each level relative to the map.
        init_cfg: mmengine's config of the initialisation.

    Raises:
        ValueError: If a scale is none of 4, 2, 1 and 0.5, or there are fewer outputs than scales.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if num_outs < len(scales):
            raise ValueError(f"SimpleFeaturePyramid: num_outs is {num_outs}, but there are {len(scales)} scales")
        self.num_outs = num_outs
        self.levels = nn.ModuleList()
        for scale in scales:
            resize, channels = rescale(in_channels, scale)
            lateral = [nn.Conv2d(channels, out_channels, 1, bias=False), LayerNorm2d(out_channels)]
            smooth = [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels)]
            self.levels.append(nn.Sequential(resize, *lateral, *smooth))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the levels of the pyramid, in the order of ``scales``."""
        levels = [level(maps[-1]) for level in self.levels]
        while len(levels) < self.num_outs:
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return tuple(levels)
