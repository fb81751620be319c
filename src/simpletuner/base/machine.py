"""Host memory, disk space, GPUs and network address of this machine. Does not import torch."""

import csv
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")

GPU_QUERY_TIMEOUT_S = 2.0
TORCH_QUERY_TIMEOUT_S = 120.0
GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Device files of the NVIDIA and AMD drivers."""
_COUNT_BY_TORCH = "import torch; print(torch.cuda.device_count())"

_GPU_FIELDS = "index,name,driver_version,memory.total,memory.used,utilization.gpu"
_GPU_FLAGS = {"query-gpu": _GPU_FIELDS, "format": "csv,noheader,nounits"}
_MIB = 2**20


@dataclass(frozen=True)
class HostMemory:
    """RAM of this process, within the limits of its control groups (version 2)."""

    total_bytes: int
    available_bytes: int
    """Bytes that the system can allocate, including cached file pages that it can drop."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver reports it. Values that the driver does not report are None."""

    index: int
    name: str
    driver: str
    """Driver version."""
    total_bytes: int | None
    used_bytes: int | None
    """Bytes used by all processes of the machine."""
    utilization_percent: int | None
    """Percentage of the last sampling period in which a kernel ran."""


def host_memory() -> HostMemory | None:
    """Total and available RAM; None on a system without /proc/meminfo."""
    if not MEMINFO.exists():
        return None
    lines = dict(line.split(":") for line in MEMINFO.read_text(encoding="ascii").splitlines())
    total, available = (int(lines[key].removesuffix("kB")) * 1024 for key in ("MemTotal", "MemAvailable"))
    for limit, free in _group_limits():
        total, available = min(total, limit), min(available, free)
    return HostMemory(total, max(available, 0))


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`, or of its nearest parent that exists."""
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if os.path.isdir(folder))).free


def source_address(elsewhere: str) -> str:
    """This machine's address on its route to the address `elsewhere`. Looks up the route; sends nothing.

    Raises:
        OSError: there is no route.
    """
    with socket.socket(socket.AF_INET6 if ":" in elsewhere else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((elsewhere, 9))
        return str(probe.getsockname()[0])


def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine, from `nvidia-smi`; empty if it is missing, fails or takes over 2 s."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    try:
        printed = subprocess.run(
            [command, *(f"--{flag}={value}" for flag, value in _GPU_FLAGS.items())],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GPU_QUERY_TIMEOUT_S,
            check=True,
        ).stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = csv.reader(printed.splitlines(), skipinitialspace=True)
    return tuple(_gpu(row) for row in rows if len(row) == _GPU_FIELDS.count(",") + 1 and row[0].isdecimal())


def visible_gpus(environ: Mapping[str, str]) -> int:
    """Number of GPUs that a process with this environment can use. Takes no GPU memory.

    If there is a driver but `nvidia-smi` is missing or too slow, another process counts them with torch.
    """
    count = len(gpus())
    if count:
        return _visible_count(environ.get("CUDA_VISIBLE_DEVICES"), count)
    if not any(driver.exists() for driver in GPU_DRIVERS):
        return 0
    try:
        printed = subprocess.run(
            [sys.executable, "-P", "-c", _COUNT_BY_TORCH],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TORCH_QUERY_TIMEOUT_S,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return 0
    return int(printed) if printed.isdigit() else 0


def _visible_count(listed: str | None, count: int) -> int:
    """How many of `count` GPUs are visible with CUDA_VISIBLE_DEVICES: those listed before the first invalid name."""
    if listed is None:
        return count
    counted_names: list[str] = []
    for name in map(str.strip, listed.split(",")):
        is_known = int(name) < count if name.isascii() and name.isdecimal() else name.startswith(("GPU-", "MIG-"))
        if not is_known or name in counted_names:
            break
        counted_names.append(name)
    return len(counted_names)


def _gpu(row: list[str]) -> Gpu:
    # A GPU that shares host memory, or a MIG slice, reports "[N/A]".
    total, used, utilization = (int(text) if text.strip().isdecimal() else None for text in row[3:])
    return Gpu(
        index=int(row[0]),
        name=row[1].strip(),
        driver=row[2].strip(),
        total_bytes=None if total is None else total * _MIB,
        used_bytes=None if used is None else used * _MIB,
        utilization_percent=utilization,
    )


def _group_limits() -> list[tuple[int, int]]:
    """Limit and free bytes of each control group of this process. Cached file pages count as free."""
    if not OWN_CGROUP.exists():
        return []
    names = [line.removeprefix("0::/") for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::/")]
    limits = []
    for folder in [CGROUPS / name for name in names]:
        for group in (folder, *folder.parents):
            if group.is_relative_to(CGROUPS) and (group / "memory.max").exists():
                limit = (group / "memory.max").read_text().strip()
                if limit != "max":
                    used = int((group / "memory.current").read_text())
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    free = int(limit) - used + int(stat["inactive_file"]) + int(stat["active_file"])
                    limits.append((int(limit), free))
    return limits
