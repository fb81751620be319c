"""How much memory a device has left, and how to give it back."""

import gc

import torch

from simpletuner.base.machine import MEMINFO, host_memory


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on `device`: what the driver has and what torch holds unused; on the CPU what the
    system could free, within the limits of this process's control groups (version 2).

    Raises:
        OSError: the system does not say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    memory = host_memory()
    if memory is None:
        raise FileNotFoundError(f"{MEMINFO} is missing")
    return memory.available_bytes


def release_memory(device: torch.device) -> None:
    """Free what is not referenced any more, so that the next phase finds it available."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
