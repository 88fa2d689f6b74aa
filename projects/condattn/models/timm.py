"""Any timm model as a backbone of mmdet and mmseg."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, initialize
from mmengine.registry import MODELS
from timm.models import group_parameters
from torch import Tensor
from torch.nn import functional as F

from ..condition import condition
from ..methods.base import Conditioning

# What lets a model take images of any size, in the order in which timm's models know it.
ANY_SIZE = (dict(dynamic_img_size=True), dict(strict_img_size=False), {})


@MODELS.register_module()
class ConditionedTimmBackbone(BaseModule):
    """A timm model's intermediate features, with conditioned attention.

    Shape: images (B, 3, H, W), of any size where the model can; one feature map (B, ``out_channels[i]``,
    H / ``strides[i]``, W / ``strides[i]``), rounded up, for each of ``out_indices``.

    Args:
        model_name: Name of the model in timm, for instance ``'xcit_small_12_p16_224'``.
        out_indices: Which of the model's features to return: stages of a pyramid, blocks of a ViT. Default: all stages
            of a pyramid, the last block of a ViT.
        conditioning: See :func:`condattn.condition`. ``'none'`` is timm's model, bit for bit.
        include: Patterns of the sites to condition, see :func:`condattn.condition`.
        exclude: Patterns of the sites to leave out.
        pretrained: Start from timm's public weights, which ``init_weights`` downloads.
        checkpoint_path: Start from the weights of a whole timm model in this file, which ``init_weights`` reads.
        img_size: The size of the images, for models that have to know it.
        frozen_stages: Freeze the stem (0) and this many stages; -1 freezes nothing.
        drop_path_rate: Stochastic depth, where it is not the model's default.
        with_cp: Recompute activations in the backward pass to save memory.
        init_cfg: Initialisation by mmengine, of the timm model.
        **kwargs: Further arguments of the timm model.

    Raises:
        ValueError: If the model is unknown, has no intermediate features or not these, or its attention cannot be
            conditioned.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        conditioning: Conditioning = "pc",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        pretrained: bool = False,
        checkpoint_path: str = "",
        img_size: int | tuple[int, int] | None = None,
        frozen_stages: int = -1,
        drop_path_rate: float | None = None,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(init_cfg)
        if not timm.is_model(model_name):
            near = ", ".join(timm.list_models(f"*{model_name.split('_')[0]}*")[:5])
            raise ValueError(f"timm has no model {model_name}{f'; it has {near}, ...' if near else ''}")
        options = dict(img_size=img_size, drop_path_rate=drop_path_rate)
        settings = {**kwargs, **{name: value for name, value in options.items() if value is not None}}
        self.model = _create(model_name, settings)
        self._weights = (model_name, settings, dict(pretrained=pretrained, checkpoint_path=checkpoint_path))
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"{model_name} of timm gives no intermediate features; choose another model")
        features = _features(self.model)
        reductions = [feature["reduction"] for feature in features]
        if out_indices is None:
            out_indices = range(len(features)) if len(set(reductions)) > 1 else [len(features) - 1]
        self.out_indices = [index % len(features) for index in out_indices if -len(features) <= index < len(features)]
        if len(self.out_indices) < len(list(out_indices)):
            raise ValueError(f"out_indices is {list(out_indices)}; {model_name} has {len(features)} features, from 0")
        self.strides = [reductions[index] for index in self.out_indices]
        self.out_channels = [features[index]["num_chs"] for index in self.out_indices]
        # What no feature depends on would have no gradient, which distributed training does not forgive.
        self.model.prune_intermediate_layers(self.out_indices, prune_norm=True, prune_head=True)
        report = condition(self.model, conditioning, include, exclude)
        print_log(f"{model_name}: {report}", logger="current")
        if with_cp:
            self.model.set_grad_checkpointing(True)
        self._freeze(frozen_stages)

    def init_weights(self) -> None:
        """Load the weights that ``pretrained`` or ``checkpoint_path`` asks for, or initialise as ``init_cfg`` says.

        Raises:
            RuntimeError: If the weights cannot be had, or a parameter of the backbone is not among them.
        """
        if self.init_cfg is not None:
            initialize(self.model, self.init_cfg)
        model_name, settings, source = self._weights
        if not any(source.values()):
            return
        try:
            whole = _create(model_name, {**settings, **source})
        except (OSError, RuntimeError, ValueError) as error:
            advice = "train from random weights with pretrained=False and without checkpoint_path"
            reason = " ".join(f"{source['checkpoint_path']} {type(error).__name__} {error}".split())
            raise RuntimeError(f"no weights for {model_name}: {reason}; {advice}") from error
        missing, _ = self.model.load_state_dict(whole.state_dict(), strict=False)
        if missing:
            raise RuntimeError(
                f"{model_name}: weights without {', '.join(missing[:3])}; {len(missing)} keys are missing"
            )

    def train(self, mode: bool = True):
        """Set the training mode, but for what is frozen, and return self."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The feature maps of a batch of images; images are padded on the right and below to whole strides."""
        height, width = x.shape[-2:]
        step = max(self.strides)
        x = F.pad(x, (0, -width % step, 0, -height % step))
        maps = self.model.forward_intermediates(
            x, indices=self.out_indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        sizes = [(-(-height // stride), -(-width // stride)) for stride in self.strides]
        return tuple(m[..., :h, :w] for m, (h, w) in zip(maps, sizes, strict=True))

    def _freeze(self, stages: int) -> None:
        groups = group_parameters(self.model, self.model.group_matcher(coarse=True)) if stages >= 0 else {}
        names = [name for group, members in groups.items() if group <= stages for name in members]
        parameters = dict(self.model.named_parameters())
        for name in names:
            if name in parameters:
                parameters[name].requires_grad_(False)
        owners = {name.rpartition(".")[0] for name in names}
        self._frozen = [module for name, module in self.model.named_modules() if name in owners and name]
        self.train(self.training)


def _create(model_name: str, settings: dict[str, Any]) -> torch.nn.Module:
    """Build the model, with the first of ANY_SIZE that it takes; the last is nothing, and its error the caller's."""
    for option in ANY_SIZE:
        try:
            return timm.create_model(model_name, **{**option, **settings})
        except TypeError as error:
            if not any(name in str(error) for name in option):
                raise ValueError(f"timm's {model_name}: {error}") from error


def _features(model: torch.nn.Module) -> list[dict[str, Any]]:
    info = model.feature_info
    return list(info.info if hasattr(info, "info") else info)
