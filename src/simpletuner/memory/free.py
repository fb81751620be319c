"""How much memory a device has left, and how to give it back."""

import gc
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on `device`: what the driver has and what torch holds unused; on the CPU what the
    system could free, within the limits of this process's control groups (version 2)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([_available(), *_left_in_groups()])


def release_memory(device: torch.device) -> None:
    """Free what is not referenced any more, so that the next phase finds it available."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _available() -> int:
    lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].removesuffix("kB")) * 1024


def _left_in_groups() -> list[int]:
    """What each group around this process has left. File pages count as free: the system drops them when it must."""
    if not OWN_CGROUP.exists():
        return []
    names = [line.removeprefix("0::/") for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::/")]
    left = []
    for folder in [CGROUPS / name for name in names]:
        for group in (folder, *folder.parents):
            if group.is_relative_to(CGROUPS) and (group / "memory.max").exists():
                limit = (group / "memory.max").read_text().strip()
                if limit != "max":
                    used = int((group / "memory.current").read_text())
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    left.append(int(limit) - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    return left
