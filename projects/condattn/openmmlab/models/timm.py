"""Any timm model as a backbone of mmdet and mmseg."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, initialize
from mmengine.registry import MODELS
from timm.models import group_parameters
from torch import Tensor

from ...condition import condition
from ...methods.parsing import DEFAULT, Conditioning
from ...weights.files import DownloadError
from ...weights.load import load_weights
from .base import TIMM, initialize_as_upstream, load_as_configured, pretrained_entry, refuse_initial_weights
from .image_size import features, find_image_sizes, map_size
from .loading import guard_loading

# Arguments that make timm's models accept images of any size, in the order in which they are tried.
ANY_SIZE = (dict(dynamic_img_size=True), dict(strict_img_size=False), {})


@MODELS.register_module()
class ConditionedTimmBackbone(BaseModule):
    """A timm model's intermediate features, with conditioned attention.

    Shape: images (B, C, H, W), C being ``in_chans`` where that is set, else 3; one feature map (B, ``out_channels[i]``,
    H / ``strides[i]``, W / ``strides[i]``), rounded up, for each of ``out_indices``. Images may be of any size: for
    models with a fixed grid of windows they are padded to a multiple of ``img_size``; for models that accept one size
    only (BEiT, CaiT, CoaT, Hiera, VOLO ...) they are padded to ``img_size``, which then is the largest size.

    Args:
        model_name: Name of the model in timm, for instance ``'xcit_small_12_p16_224'``; ``timm/`` or ``hf-hub:timm/``
            may precede it, as on the Hugging Face Hub, and a dot and the tag of pretrained weights may follow it.
        out_indices: Which of the model's features to return, in ascending order (or one alone): stages of a pyramid,
            blocks of a ViT. Default: all stages of a pyramid, the last block of a ViT.
        conditioning: See :func:`condattn.condition`. ``'none'`` is timm's model, bit for bit. Default: ``'pc'``.
        include: Patterns of the sites to condition, see :func:`condattn.condition`.
        exclude: Patterns of the sites to leave out.
        pretrained: Start from timm's public weights, which ``init_weights`` downloads, unless ``checkpoint_path`` or
            an ``init_cfg`` with a ``type`` says otherwise.
        checkpoint_path: Start from the weights in this file, timm's or the official ones of the network: short for
            ``init_cfg=dict(type='Pretrained', checkpoint=...)``, see :class:`.base.ConditionedBackbone`.
        img_size: The size of the images (height and width, or one number), for models that need to know it.
        frozen_stages: Freeze the stem (0) and this many stages, or blocks of a ViT; -1 freezes nothing.
        drop_path_rate: Rate of stochastic depth. Default: the model's own.
        with_cp: Recompute activations in the backward pass to save memory.
        init_cfg: mmengine's config of the initialisation of the timm model. Without a ``type``, it has further settings
            of the weights that ``pretrained`` or ``checkpoint_path`` names, such as ``dict(load='effective')``.
        **kwargs: Further arguments of the timm model.

    Raises:
        ValueError: If the model is unknown, does not give the requested features, does not support a setting, or has
            attention that cannot be conditioned; in ``forward`` if an image is too large for the model.
    """

    checks_its_weights = True

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | int | None = None,
        conditioning: Conditioning = DEFAULT,
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
        model_name = _registry_name(model_name, kwargs.get("pretrained_cfg"))
        if kwargs.pop("features_only", False):
            raise ValueError("features_only: this backbone always returns features; leave the setting out")
        super().__init__(_initial_weights(checkpoint_path or (TIMM + model_name if pretrained else ""), init_cfg))
        options = dict(img_size=img_size, drop_path_rate=drop_path_rate)
        settings = {**kwargs, **{name: value for name, value in options.items() if value is not None}}
        self.model = _create(model_name, settings)
        self._settings = settings
        self.weights_setting = "checkpoint_path" if checkpoint_path or pretrained else "init_cfg.checkpoint"
        self._names = list(self.model.state_dict())  # before parts of the model are pruned
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"{model_name} of timm gives no intermediate features; choose another model")
        infos = _features(self.model)
        reductions = [info["reduction"] for info in infos]
        if out_indices is None:
            out_indices = range(len(infos)) if len(set(reductions)) > 1 else [len(infos) - 1]
        out_indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        known = [index for index in out_indices if isinstance(index, int) and -len(infos) <= index < len(infos)]
        self.out_indices = [index % len(infos) for index in known]
        if not known or len(known) < len(out_indices) or self.out_indices != sorted(set(self.out_indices)):
            raise ValueError(
                f"out_indices is {out_indices}; {model_name} has {len(infos)} features, from 0: "
                "name some of them in ascending order"
            )
        self.strides = [reductions[index] for index in self.out_indices]
        self.out_channels = [infos[index]["num_chs"] for index in self.out_indices]
        native = img_size or self.model.pretrained_cfg["input_size"][-2:]
        native = (native, native) if isinstance(native, int) else tuple(native)
        try:
            self.image_sizes = find_image_sizes(
                self.model,
                lambda: _create(model_name, settings),
                native,
                self.out_indices,
                self.strides,
                settings.get("in_chans") or self.model.pretrained_cfg["input_size"][0],
            )
        except ValueError as error:
            raise ValueError(f"timm's {model_name} {error}") from error
        # Parameters that no feature depends on would get no gradient, which is an error in distributed training.
        self.model.prune_intermediate_layers(self.out_indices, prune_norm=True, prune_head=True)
        report = condition(self.model, conditioning, include, exclude)
        guard_loading(self)
        print_log(f"{model_name}: {report}", logger="current")
        if with_cp:
            try:
                self.model.set_grad_checkpointing(True)
            except AssertionError as error:
                raise ValueError(f"with_cp: timm's {model_name} has no activation checkpointing") from error
        if not (isinstance(frozen_stages, int) and -1 <= frozen_stages <= len(infos)):
            raise ValueError(f"frozen_stages is {frozen_stages}; {model_name} has {len(infos)} stages, -1 freezes none")
        self._frozen = _freeze(self.model, frozen_stages)

    def init_weights(self) -> None:
        """Load the weights that ``pretrained`` or ``checkpoint_path`` asks for, or initialise as ``init_cfg`` says.

        Raises:
            ValueError: If the weights cannot be downloaded or read, or are of another model.
        """
        entry = pretrained_entry(self.init_cfg)
        if entry and str(entry.get("checkpoint")).startswith(TIMM):
            self._download(**{name: value for name, value in entry.items() if name != "type"})
        elif entry:
            load_as_configured(self.model, self.init_cfg, known=self._names)
        elif self.init_cfg is not None:
            initialize_as_upstream(self, lambda: initialize(self.model, self.init_cfg))

    def _download(self, checkpoint: str, load: str = "raw", **other: Any) -> None:
        refuse_initial_weights(self.model)
        model_name = checkpoint.removeprefix(TIMM)
        if other:
            raise ValueError(
                f"init_cfg has {', '.join(other)}; with weights of timm its settings are checkpoint and load"
            )
        weights = pretrained_weights(model_name, **self._settings)
        report = load_weights(self.model, weights, f"timm's {model_name}", load, self._names)
        print_log(f"pretrained weights {report}", logger="current")

    def train(self, mode: bool = True):
        """Set the training mode, except of frozen modules, and return self."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of images, padded on the right and below to a size that the model accepts."""
        maps = features(self.model, self.image_sizes.pad(x), self.out_indices)
        sizes = [map_size(x.shape[-2:], stride) for stride in self.strides]
        return tuple(m[..., :height, :width] for m, (height, width) in zip(maps, sizes, strict=True))


def _initial_weights(checkpoint: str, init_cfg: Any) -> Any:
    """The ``init_cfg`` that also loads ``checkpoint``, a file or timm's name, unless ``init_cfg`` initialises itself.

    Raises:
        ValueError: If ``init_cfg`` without a ``type`` has no weights to apply to, or a file is named beside an
            initialisation of another kind.
    """
    if init_cfg and (not isinstance(init_cfg, Mapping) or "type" in init_cfg):
        if checkpoint and not checkpoint.startswith(TIMM):
            raise ValueError(
                f"checkpoint_path is {checkpoint}, and init_cfg initialises the weights as well; set one of them"
            )
        return init_cfg
    if init_cfg and not checkpoint:
        raise ValueError(
            f"init_cfg is {dict(init_cfg)}, without a type; add type='Pretrained' and checkpoint=FILE, or set "
            "checkpoint_path or pretrained=True"
        )
    return {"type": "Pretrained", "checkpoint": checkpoint, **(init_cfg or {})} if checkpoint else init_cfg


def _freeze(model: torch.nn.Module, stages: int) -> list[torch.nn.Module]:
    """Freeze the stem and the first ``stages`` stages; return the modules that must stay in evaluation mode."""
    if stages < 0:
        return []
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"frozen_stages: timm's {type(model).__name__} does not say what its stages are")
    groups = group_parameters(model, model.group_matcher(coarse=True))
    parameters = dict(model.named_parameters())
    for name in [name for group, members in groups.items() if group <= stages for name in members]:
        if name in parameters:
            parameters[name].requires_grad_(False)
    dropout = [child for child in model.children() if isinstance(child, torch.nn.Dropout)]  # dropout of the stem
    return dropout + [
        module
        for module in model.modules()
        if (own := list(module.parameters())) and not any(parameter.requires_grad for parameter in own)
    ]


def pretrained_weights(model_name: str, **settings: Any) -> dict[str, Tensor]:
    """Return timm's pretrained weights for a model built with ``settings``.

    Raises:
        ValueError: If there are none, or they cannot be downloaded; also an ``OSError`` if the cause is one.
    """
    try:
        return _create(model_name, {**settings, "pretrained": True}).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        failure = DownloadError if isinstance(error, OSError) else ValueError
        raise failure(f"timm has no weights for {model_name}, or they cannot be downloaded: {reason}") from error


def _registry_name(model_name: str, pretrained_cfg: Any = None) -> str:
    """Return the name in timm's registry for ``model_name``.

    Raises:
        ValueError: If there is no such model, or no such weights of it.
    """
    name = re.sub(r"^(hf[-_]hub:)?timm/", "", str(model_name))
    if ":" in name or "/" in name:
        raise ValueError(
            f"model_name is {model_name!r}; expected a model of timm itself, such as 'vit_tiny_patch16_224'; for "
            "weights from elsewhere name their architecture, and their file in checkpoint_path"
        )
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ValueError(f"timm has no model {name}{f'; it has {near}, ...' if near else ''}")
    architecture, _, tag = name.partition(".")
    tag = pretrained_cfg if isinstance(pretrained_cfg, str) else tag
    try:
        timm.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    except RuntimeError as error:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise ValueError(
            f"timm's {architecture} has no weights with the tag {tag}; it has {', '.join(tags) or 'none'}"
        ) from error
    return name


def _create(model_name: str, settings: dict[str, Any]) -> torch.nn.Module:
    """Build the model with the first of ``ANY_SIZE`` that it accepts; the last is empty: its error is raised."""
    for option in ANY_SIZE:
        try:
            return timm.create_model(model_name, **{**option, **settings})
        except (AssertionError, TypeError) as error:
            if not any(name in str(error) for name in option):
                raise ValueError(f"timm's {model_name}: {str(error).splitlines()[0]}") from error


def _features(model: torch.nn.Module) -> list[dict[str, Any]]:
    info = model.feature_info
    return list(info.info if hasattr(info, "info") else info)
