"""What the conditioned faces of upstream backbones share."""

from collections.abc import Collection
from typing import Any

from mmengine.logging import print_log
from torch import nn

from ..checkpoints.convert import LoadReport, load_pretrained
from ..condition import condition
from ..methods.base import Conditioning


class ConditionedBackbone:
    """Mixin in front of an upstream backbone class: the same arguments, and ``conditioning``.

    ``init_cfg=dict(type='Pretrained', checkpoint=FILE)`` takes the weights of any release of the same network, see
    :func:`condattn.checkpoints.convert.load_pretrained`; with ``load='effective'`` besides, such that spectral
    correction does not change the function of weights that were trained without it.

    Args:
        conditioning: How the attention is conditioned; see :func:`condattn.condition`. ``'none'`` is the upstream
            backbone, bit for bit. Default: ``'pc'``.
        **kwargs: The upstream class's arguments.

    Raises:
        ValueError: If the conditioning is unknown or invalid.
    """

    def __init__(self, *args, conditioning: Conditioning = "pc", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        report = condition(self, conditioning)
        print_log(f"{type(self).__name__}: {report}", logger="current")

    def init_weights(self) -> None:
        """Initialise as upstream does, but pretrained weights whoever named them.

        Raises:
            ValueError: If the pretrained weights cannot be read, or are of another model.
        """
        if is_pretrained(self.init_cfg):
            load_as_configured(self, self.init_cfg)
        else:
            super().init_weights()

    def train(self, mode: bool = True):
        """Set the training mode and return self, as ``nn.Module`` does and upstream's backbones do not."""
        super().train(mode)
        return self


def is_pretrained(init_cfg: Any) -> bool:
    """Whether an ``init_cfg`` of mmengine asks for pretrained weights."""
    return isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained"


def load_as_configured(model: nn.Module, init_cfg: dict, known: Collection[str] = ()) -> LoadReport:
    """Load what an ``init_cfg`` of type 'Pretrained' names into ``model``, and log what became of it.

    Raises:
        ValueError: As :func:`condattn.checkpoints.convert.load_pretrained`, and for settings that it does not know.
    """
    settings = {name: value for name, value in init_cfg.items() if name not in ("type", "map_location", "prefix")}
    known_settings = ("checkpoint", "load", "unsafe")
    if unknown := settings.keys() - set(known_settings):
        raise ValueError(
            f"init_cfg of type 'Pretrained' has {', '.join(sorted(unknown))}; its settings are "
            f"{', '.join(known_settings)}"
        )
    report = load_pretrained(model, settings.pop("checkpoint"), known=known, **settings)
    print_log(f"pretrained weights {report}", logger="current")
    return report
