"""Train with parameters, gradients and optimizer state sharded over the processes (FSDP2)."""

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.fsdp
from mmengine import dist
from mmengine._strategy import DDPStrategy
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import STRATEGIES
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...attention.rules import find_sites
from ...weights.atomic import write_atomically
from ..errors import UserError
from ..models.settings import class_name, inner_settings, setting_path


@STRATEGIES.register_module()
class FSDP2Strategy(DDPStrategy):
    """torch's ``fully_shard`` for mmengine's ``FlexibleRunner``; mmengine's own ``FSDPStrategy`` is the older FSDP1.

    Every transformer block with attention is sharded as a unit of its own, and gathered when it is used; all other
    parameters form the unit of the model. Checkpoints contain full tensors in one file, like those of all other runs: a
    sharded run can be resumed unsharded, with any number of processes, and vice versa. A single process does not shard.

    Args:
        reshard_after_forward: Free the gathered parameters of a block between its forward and its backward pass, which
            gathers them again: less memory for more communication.
        **kwargs: Arguments of mmengine's ``DDPStrategy``.
    """

    def __init__(self, *, reshard_after_forward: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.reshard_after_forward = reshard_after_forward

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if not dist.is_distributed():
            return super(DDPStrategy, self)._wrap_model(model)
        from torch.distributed.fsdp import fully_shard

        model = self.convert_model(model.to(get_device()))
        for value in model.state_dict().values():
            dist.broadcast(value, src=0)  # as DDP does, so that all processes shard the same values
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
        """Gather the full state, a collective operation, and write it on rank 0."""
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
            write_atomically(filename, lambda path: torch.save(checkpoint, path), overwrite=True)

    def model_state_dict(self) -> dict[str, Tensor]:
        """Return the full weights on the CPU of rank 0, and empty tensors on other ranks."""
        return tree_map(_gather, dict(self.model.state_dict()))

    def optim_state_dict(self) -> dict[str, Any]:
        """Return the full state of the optimizer on the CPU of rank 0, with empty tensors on other ranks."""
        return tree_map(_gather, super().optim_state_dict())

    def load_model_state_dict(
        self, state_dict: dict[str, Tensor], *, strict: bool = False, revise_keys: tuple = ((r"^module\.", ""),)
    ) -> None:
        """Load full weights; each process keeps its shard of them."""
        own, shards = self.model.state_dict(), OrderedDict()
        for name, value in state_dict.items():
            for pattern, replacement in revise_keys:
                name = re.sub(pattern, replacement, name)
            shards[name] = _shard(value, own.get(name))
        super().load_model_state_dict(shards, strict=strict, revise_keys=[])

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the full state of an optimizer; each process keeps its shard of it."""
        parameters = [one for group in self.optim_wrapper.optimizer.param_groups for one in group["params"]]
        state = {
            index: {name: _shard(value, parameters[index]) for name, value in part.items()}
            for index, part in state_dict["state"].items()
        }
        super().load_optim_state_dict({**state_dict, "state": state})


def is_sharded(cfg: Config) -> bool:
    """Whether the run of ``cfg`` shards its model: with ``FSDP2Strategy`` and several processes."""
    return class_name(cfg.get("strategy") or {}) == "FSDP2Strategy" and cfg.launcher != "none"


def check_sharding(cfg: Config) -> None:
    """Check that sharding supports the settings of ``cfg``, if it shards.

    Raises:
        UserError: If it does not.
    """
    hooks = [*(cfg.get("default_hooks") or {}).values(), *(cfg.get("custom_hooks") or ())]
    names = [class_name(hook) for hook in hooks if isinstance(hook, dict)]
    if "EMAHook" in names and cfg.get("runner_type") == "FlexibleRunner":
        raise UserError("FlexibleRunner loads checkpoints before EMAHook has its copy of the model; remove that hook")
    if not is_sharded(cfg):
        return
    if cfg.get("runner_type") != "FlexibleRunner":
        raise UserError(f"FSDP2Strategy expects runner_type='FlexibleRunner', found {cfg.get('runner_type')}")
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        raise UserError(f"FSDP2Strategy expects torch 2.6 or newer, found {torch.__version__}")
    for hook, why in (
        ("SpectraHook", "it measures whole weights; use tools/analysis/spectra.py on a checkpoint"),
        ("CalibrationHook", "use tools/checkpoints/calibrate.py, and start from what it writes"),
    ):
        if hook in names:
            raise UserError(f"FSDP2Strategy expects hooks without {hook}: {why}")
    if cfg.get("find_unused_parameters"):
        raise UserError("FSDP2Strategy expects every process to use every parameter, found find_unused_parameters=True")
    if (inner_settings(cfg.model).get("test_cfg") or {}).get("mode") == "slide":
        raise UserError(
            "FSDP2Strategy expects processes that run the model equally often, found "
            f"{setting_path(cfg.model, 'test_cfg')}.mode='slide'; set it to 'whole', and evaluate checkpoints in one "
            "process"
        )


def check_shardable(model: nn.Module) -> None:
    """Check that the parameters of ``model`` can be sharded.

    Raises:
        UserError: If a parameter is a scalar, such as that of mmcv's ``Scale`` (in the heads of FCOS, ATSS ...).
    """
    if scalars := [name for name, parameter in model.named_parameters() if parameter.dim() == 0]:
        raise UserError(
            f"FSDP2Strategy expects parameters with an axis to divide, found the single number {scalars[0]}; train "
            "this model without sharding"
        )


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Find the blocks to shard, nested blocks before those that contain them.

    The block of an attention site is the innermost member of a ``ModuleList`` or ``Sequential`` around it. Blocks that
    share parameters with modules outside them are left out.
    """
    modules = dict(model.named_modules())
    names = []
    for site in find_sites(model):
        path = site.name.split(".")
        for length in range(len(path) - 1, 0, -1):
            if isinstance(modules[".".join(path[: length - 1])], nn.ModuleList | nn.Sequential):
                names.append(".".join(path[:length]))
                break
    places = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    blocks = []
    for name in sorted(dict.fromkeys(names), key=lambda name: -name.count(".")):
        own = [id(parameter) for _, parameter in modules[name].named_parameters(remove_duplicate=False)]
        if all(own.count(one) == places.count(one) for one in set(own)):
            blocks.append(modules[name])
    return blocks


def _gather(value: Any) -> Any:
    """Gather a tensor if it is sharded: on the CPU of rank 0, empty on other ranks. Return other values unchanged."""
    if not isinstance(value, Tensor):
        return value
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.cpu() if dist.is_main_process() else value.new_empty(0)


def _shard(value: Any, like: Tensor | None) -> Any:
    """Shard a full tensor like ``like``, if that is a sharded tensor of its shape; return other values unchanged."""
    if not (hasattr(like, "full_tensor") and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
