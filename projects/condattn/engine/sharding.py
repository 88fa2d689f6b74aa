"""Training with parameters, gradients and optimizer state sharded over the processes (FSDP2)."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine import dist
from mmengine._strategy import DDPStrategy
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import STRATEGIES
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..checkpoints.files import write_whole
from ..sites import find_sites
from .errors import UserError


@STRATEGIES.register_module()
class FSDP2Strategy(DDPStrategy):
    """torch's ``fully_shard`` for mmengine's ``FlexibleRunner``; mmengine's own ``FSDPStrategy`` is the older FSDP1.

    Every transformer block with attention is a unit of its own, gathered when it is used; what is left belongs to the
    whole model. Checkpoints are whole ones in one file, as every other run writes them: a sharded run can go on
    unsharded, with any number of processes, and the other way round. One process by itself shards nothing.

    Args:
        reshard_after_forward: Free the gathered parameters of a block between its forward and its backward pass, which
            gathers them again: less memory for more communication.
        **kwargs: As mmengine's ``DDPStrategy``.
    """

    def __init__(self, *, reshard_after_forward: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.reshard_after_forward = reshard_after_forward

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if not dist.is_distributed():
            return super(DDPStrategy, self)._wrap_model(model)
        try:
            from torch.distributed.fsdp import fully_shard
        except ImportError as error:
            raise UserError(f"FSDP2Strategy needs torch 2.6 or newer, found {torch.__version__}") from error
        model = self.convert_model(model.to(get_device()))
        for value in model.state_dict().values():
            dist.broadcast(value, src=0)  # as DDP does: the processes shard the same model
        for block in transformer_blocks(model):
            fully_shard(block, reshard_after_forward=self.reshard_after_forward)
        return fully_shard(model)

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict | None = None,
        callback: Callable[[dict], None] | None = None,
    ) -> None:
        """Gather the whole state, in which every process takes part, and write it from the first."""
        checkpoint = {"state_dict": self.model_state_dict()}
        if save_optimizer and hasattr(self, "optim_wrapper"):
            checkpoint["optimizer"] = self.optim_state_dict()
        if save_param_scheduler and hasattr(self, "param_schedulers"):
            checkpoint["param_schedulers"] = self.scheduler_state_dict()
        checkpoint.update(extra_ckpt or {})
        checkpoint.setdefault("meta", {})["seed"] = self.seed
        if callback is not None:
            callback(checkpoint)
        if dist.is_main_process():
            write_whole(filename, lambda path: torch.save(checkpoint, path), overwrite=True)

    def model_state_dict(self) -> dict[str, Tensor]:
        """The whole weights, on the CPU."""
        return tree_map(_whole, dict(self.model.state_dict()))

    def optim_state_dict(self) -> dict[str, Any]:
        """The whole state of the optimizer, on the CPU."""
        return tree_map(_whole, super().optim_state_dict())

    def load_model_state_dict(
        self, state_dict: dict[str, Tensor], *, strict: bool = False, revise_keys: tuple = ((r"^module\.", ""),)
    ) -> None:
        """Load whole weights: of each this process keeps its share."""
        own, shares = self.model.state_dict(), OrderedDict()
        for name, value in state_dict.items():
            for pattern, replacement in revise_keys:
                name = re.sub(pattern, replacement, name)
            shares[name] = _share(value, own.get(name))
        super().load_model_state_dict(shares, strict=strict, revise_keys=[])

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the whole state of an optimizer: of each part this process keeps its share."""
        parameters = [one for group in self.optim_wrapper.optimizer.param_groups for one in group["params"]]
        state = {
            index: {name: _share(value, parameters[index]) for name, value in part.items()}
            for index, part in state_dict["state"].items()
        }
        super().load_optim_state_dict({**state_dict, "state": state})


def check_sharding(cfg: Config) -> None:
    """Check that what ``cfg`` asks for can be had when it is sharded.

    Raises:
        UserError: If it asks for a moving average of the weights, for which the sharded model would have to be copied.
    """
    hooks = [hook.get("type") for hook in cfg.get("custom_hooks") or [] if isinstance(hook, dict)]
    if (cfg.get("strategy") or {}).get("type") == "FSDP2Strategy" and cfg.launcher != "none" and "EMAHook" in hooks:
        raise UserError("FSDP2Strategy expects a run without moving average, found EMAHook in custom_hooks; remove one")


def transformer_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks around the attention sites: innermost members of lists of modules, once each."""
    modules = dict(model.named_modules())
    seen = set()
    for site in find_sites(model):
        path = site.name.split(".")
        for length in range(len(path) - 1, 0, -1):
            parent, name = modules[".".join(path[: length - 1])], ".".join(path[:length])
            if isinstance(parent, nn.ModuleList | nn.Sequential):
                if name not in seen:
                    seen.add(name)
                    yield modules[name]
                break


def _whole(value: Any) -> Any:
    """A tensor on the CPU, gathered if it is sharded; anything else as it is."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.cpu() if isinstance(value, Tensor) else value


def _share(value: Any, like: Tensor | None) -> Any:
    """The share of this process of a whole tensor, if ``like`` is a sharded one of its shape."""
    if not (hasattr(like, "full_tensor") and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
