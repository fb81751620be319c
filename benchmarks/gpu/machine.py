"""Describe the machine, and measure how fast it multiplies and copies: the reference for all other numbers.

python benchmarks/gpu/machine.py [--device cpu --tiny]
"""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from measuring import parser, seconds_of
from results import EXPANDABLE_SEGMENTS, GIB, WORK, report

from simpletuner.memory.rate import matmul_rate

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
ALSO = ("tokenizers", "triton", "bitsandbytes", "peft", "pytest", "beartype")
"""Packages that are used if they are installed."""
COPY_BYTES = {True: 2**24, False: 2**32}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    device: torch.device = arguments.device
    for name, value in facts(device).items():
        report("fact", name=name, value=value)
    side = 512 if arguments.tiny else None
    rate = matmul_rate(device, torch.bfloat16) if side is None else small_rate(device, side)
    report("ceiling", what="product of large bf16 matrices", rate=rate / 1e12, unit="TFLOP/s")
    size = COPY_BYTES[arguments.tiny]
    on_device, other = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    pageable = torch.empty(size, dtype=torch.uint8)
    # Bytes per copied byte: a copy on the device reads and writes.
    copies = (
        ("copy on the device, read and write", 2 * size, other, on_device),
        ("pinned host memory to the device", size, on_device, pinned),
        ("the device to pinned host memory", size, pinned, on_device),
        ("pageable host memory to the device", size, on_device, pageable),
    )
    for what, counted, target, source in copies:
        seconds = seconds_of(functools.partial(target.copy_, source, non_blocking=True), device)
        report("ceiling", what=what, rate=counted / seconds / 1e9, unit="GB/s")


def facts(device: torch.device) -> dict[str, str]:
    """Names and versions of hardware and software."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "processor": f"{os.cpu_count()} cores, {memory_bytes() / GIB:.0f} GiB",
        "disk free": f"{shutil.disk_usage('.').free / GIB:.0f} GiB",
        "C++ compiler": shutil.which(os.environ.get("CXX", "g++")) or "none",
    }
    found["packages"], found["lacking"] = packages()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["GPU"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
        found["GPU memory"] = (
            f"{properties.total_memory / GIB:.1f} GiB, {properties.multi_processor_count} multiprocessors"
        )
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["driver"] = driver()
        found["default attention kernel"] = default_attention(device)
        found[EXPANDABLE_SEGMENTS] = WORK if segments_expand() else "do not work here"
    return found


def packages() -> tuple[str, str]:
    """Versions of the program's libraries, and which of them are missing or older than required."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    needed = dict(wanted.split(">=") for wanted in project["dependencies"])
    there, lacking = [], []
    for name in [*needed, *ALSO]:
        try:
            own = version(name)
        except PackageNotFoundError:
            lacking.append(f"{name} (missing)")
            continue
        there.append(f"{name} {own}")
        if name in needed and numbers(own) < numbers(needed[name]):
            lacking.append(f"{name} {own} ({needed[name]} is needed)")
    return ", ".join(there), ", ".join(lacking) or "nothing"


def numbers(version_text: str) -> tuple[int, ...]:
    """The release numbers of a version: (2, 11, 0) for 2.11.0+cu130."""
    return tuple(map(int, re.findall(r"\d+", version_text.partition("+")[0])))


def memory_bytes() -> int:
    """Memory of the machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def driver() -> str:
    """The driver's version."""
    told = Path("/proc/driver/nvidia/version")
    if told.exists():
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", told.read_text())
        if found:
            return found.group()
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown"
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def default_attention(device: torch.device) -> str:
    """The kernel that torch chooses by itself at dev's shape."""
    query = torch.empty(1, 48, 4608, 128, device=device, dtype=torch.bfloat16)
    chosen = torch._fused_sdp_choice(query, query, query)
    return torch.nn.attention.SDPBackend(chosen).name


def segments_expand() -> bool:
    """Whether torch's allocator supports the expandable segments that the program requests (tried in a process)."""
    tried = "import torch; torch.ones(2**20, device='cuda').sum().item()"
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    return subprocess.run([sys.executable, "-c", tried], env=environment, check=False).returncode == 0


def small_rate(device: torch.device, side: int) -> float:
    """Floating point operations per second of a small matrix product."""
    matrix = torch.randn(side, side, device=device).bfloat16()
    return 2 * side**3 / seconds_of(lambda: matrix @ matrix, device)


if __name__ == "__main__":
    main()
