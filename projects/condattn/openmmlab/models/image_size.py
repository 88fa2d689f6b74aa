"""Find out by trial which image sizes a timm model accepts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def map_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Height and width of the feature map of an image of ``size``, rounded up."""
    return -(-size[0] // stride), -(-size[1] // stride)


@dataclass(frozen=True)
class ImageSizes:
    """The image sizes that a model accepts: multiples of ``unit``, or only ``unit`` itself if ``fixed``.

    Attributes:
        unit: Height and width in pixels.
        fixed: Whether the model accepts only one size.
    """

    unit: tuple[int, int]
    fixed: bool = False

    def pad(self, images: Tensor) -> Tensor:
        """Pad images (B, C, H, W) with zeros, on the right and below, to the next size that the model accepts.

        Raises:
            ValueError: If there is no such size.
        """
        size = tuple(images.shape[-2:])
        if self.fixed and any(s > u for s, u in zip(size, self.unit, strict=True)):
            raise ValueError(
                f"an image of {size[0]} x {size[1]} pixels; this model takes {self.unit[0]} x {self.unit[1]} and less: "
                "resize the images, or set img_size to the largest, if the model knows that setting"
            )
        height, width = (-s % u for s, u in zip(size, self.unit, strict=True))
        return F.pad(images, (0, width, 0, height))


def find_image_sizes(
    model: nn.Module,
    build: Callable[[], nn.Module],
    native: tuple[int, int],
    indices: Sequence[int],
    strides: Sequence[int],
    channels: int = 3,
) -> ImageSizes:
    """Try multiples of the largest stride, then multiples of the model's native size, then this size alone.

    Args:
        model: The model; it is run only if a copy on the meta device cannot be.
        build: Builds a copy of the model; on the meta device, which is active, its forward costs nothing.
        native: The image size that the model was built for, in pixels.
        indices: Indices of the wanted features, in ascending order.
        strides: Strides of these features.
        channels: Number of channels of an image.

    Raises:
        ValueError: If the model gives no features of these strides for any of the sizes.
    """
    step = max(strides)
    try:
        with torch.device("meta"):
            candidates = [build(), model]
    except (NotImplementedError, RuntimeError):  # the model reads tensor values, which the meta device does not have
        candidates = [model]
    for candidate in candidates:
        if not _problem(candidate, (2 * step, 3 * step), indices, strides, channels):
            return ImageSizes((step, step))
        if not _problem(candidate, (native[0], 2 * native[1]), indices, strides, channels):
            return ImageSizes(native)
        if not (problem := _problem(candidate, native, indices, strides, channels)):
            return ImageSizes(native, fixed=True)
    raise ValueError(f"gives no feature maps of images of {native[0]} x {native[1]} pixels: {problem}")


@torch.no_grad()
def _problem(
    model: nn.Module, size: tuple[int, int], indices: Sequence[int], strides: Sequence[int], channels: int
) -> str:
    """Describe why ``model`` does not accept images of this size; '' if it does."""
    training = model.training
    model.eval()
    try:
        maps = features(model, torch.zeros(1, channels, *size, device=next(model.parameters()).device), indices)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:  # raised by timm's models
        return str(error).split("\n")[0]
    finally:
        model.train(training)
    got, want = [tuple(m.shape[-2:]) for m in maps], [map_size(size, stride) for stride in strides]
    return "" if got == want else f"its maps are of {got}, not of {want}"


def features(model: nn.Module, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The feature maps of a timm model, (B, C, H, W) each, for ascending ``indices``."""
    return model.forward_intermediates(
        images, indices=list(indices), norm=False, output_fmt="NCHW", intermediates_only=True
    )
