"""Join the processes of a distributed run, with or without GPUs."""

import gc
import os

import torch
from mmengine.config import Config
from mmengine.device import get_device

from .errors import UserError

LAUNCHERS = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
"""Launcher -> its environment variables for the rank, the number of processes and the local rank."""


def local_rank(launcher: str) -> int:
    """The rank of this process among those on this machine."""
    return 0 if launcher == "none" else int(_variables(launcher)[2])


def rank(launcher: str) -> int:
    """The rank of this process among those on all machines."""
    return 0 if launcher == "none" else int(_variables(launcher)[0])


def start_processes(cfg: Config) -> None:
    """Prepare a run that ``cfg.launcher`` has started.

    With an accelerator, mmengine's runner creates the process group itself. On a CPU it cannot, because it always
    selects a CUDA device. There the process group is created here, with gloo, and ``cfg`` is adapted in place: SyncBN
    becomes BN, with batch statistics per process, because torch synchronises them only on GPUs.

    Raises:
        UserError: If the launcher's variables are missing or there are more processes than GPUs.
    """
    if cfg.launcher == "none":
        return
    rank, world_size, local = _variables(cfg.launcher)
    if get_device() == "cuda" and int(local) >= torch.cuda.device_count():
        raise UserError(
            f"this machine shows {torch.cuda.device_count()} GPUs, but {int(local) + 1} or more processes "
            "were started on it; start one process for each GPU"
        )
    os.environ.update(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=local)
    if get_device() != "cpu":
        return
    os.environ.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in os.environ:
        raise UserError("set MASTER_ADDR to the host name of the first machine")
    torch.distributed.init_process_group("gloo")
    _revert_sync_bn(cfg.model)
    wrapper = {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": cfg.get("find_unused_parameters", False),
    }
    # The runner would pass device_ids=[LOCAL_RANK], which torch refuses for a model on the CPU.
    cfg.model_wrapper_cfg = {**(cfg.get("model_wrapper_cfg") or wrapper), "device_ids": None}
    if cfg.get("runner_type") == "FlexibleRunner":
        cfg.setdefault("strategy", {"type": "DDPStrategy"}).setdefault("model_wrapper", cfg.model_wrapper_cfg)


def leave_processes() -> None:
    """Destroy the process group of a distributed run; call it when nothing refers to the runner any more.

    The threads of a process group that exists when the interpreter exits may abort the process (pytorch #179291).
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def _revert_sync_bn(node) -> None:
    """Replace synchronised batch normalisation by BN in the settings of a model, in place."""
    if isinstance(node, dict):
        if node.get("type") in ("SyncBN", "MMSyncBN"):
            node["type"] = "BN"
        children = node.values()
    else:
        children = node if isinstance(node, list | tuple) else ()
    for child in children:
        _revert_sync_bn(child)


def _variables(launcher: str) -> list[str]:
    missing = [name for name in LAUNCHERS[launcher] if name not in os.environ]
    if missing:
        raise UserError(
            f"--launcher {launcher} expects the environment variables {', '.join(LAUNCHERS[launcher])}, "
            f"not set: {', '.join(missing)}; start the run with the scripts in tools/ (dist_*.sh, slurm_*.sh)"
        )
    return [os.environ[name] for name in LAUNCHERS[launcher]]
