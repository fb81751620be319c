"""Read the free memory of a device, and release unused memory."""

import gc

import torch

from simpletuner.base.machine import MEMINFO, host_memory


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`.

    On CUDA: the driver's free memory plus the unused part of torch's reservation. On the CPU: the available RAM,
    including caches that the system can drop, within the limits of this process's control groups (version 2).

    Raises:
        OSError: the system does not report it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    memory = host_memory()
    if memory is None:
        raise FileNotFoundError(f"{MEMINFO} is missing")
    return memory.available_bytes


def release_memory(device: torch.device) -> None:
    """Free unreferenced objects and torch's unused memory for the next phase."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
