"""Samplers: processes that keep a model on the GPU to generate images. A run ends them to free their memory."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from simpletuner.base.files import DirectoryLock

SAMPLERS_FOLDER = Path(".simpletuner") / "samplers"
"""Folder in a workspace with a file `GPU.PID.lock` for each sampler, which the process holds locked."""
_PATIENCE_S = 5.0
_LOOK_EVERY_S = 0.05


@contextlib.contextmanager
def registered_as_sampler(workspace: Path, environ: Mapping[str, str]) -> Iterator[None]:
    """Register this process as a sampler inside the context: a run that starts in `workspace` on the same GPU ends it.

    Raises:
        DiskError: the disk is full or read-only.
    """
    lock = DirectoryLock(workspace / SAMPLERS_FOLDER / f"{first_gpu(environ)}.{os.getpid()}.lock")
    with lock:
        try:
            yield
        finally:
            lock.path.unlink(missing_ok=True)


def stop_samplers(workspace: Path, environ: Mapping[str, str], report: Callable[[str], None]) -> None:
    """End the samplers of `workspace` on the GPUs of this run, and wait until they have exited."""
    folder = workspace / SAMPLERS_FOLDER
    for path in sorted(path for gpu in run_gpus(environ) for path in folder.glob(f"{gpu}.*.lock")):
        lock = DirectoryLock(path)
        pid = lock.pid()
        if pid is not None and lock.is_held() and _is_sampler(pid):
            report(f"Ending process {pid}, which keeps a model to generate images: this run needs its memory.")
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
                if _is_released(lock):
                    break
        if not lock.is_held():
            path.unlink(missing_ok=True)  # left by a killed sampler


def first_gpu(environ: Mapping[str, str]) -> str:
    """The first GPU of CUDA_VISIBLE_DEVICES, on which a process computes; 0 if the variable is not set."""
    return environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip().replace("/", "_") or "0"


def run_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs of a run with LOCAL_WORLD_SIZE processes on this machine, as named in CUDA_VISIBLE_DEVICES."""
    count = environ.get("LOCAL_WORLD_SIZE", "1")
    if count == "1" or not count.isdecimal():
        return [first_gpu(environ)]
    listed = environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(int(count))))
    return [name.strip().replace("/", "_") for name in listed.split(",")[: int(count)]]


def _is_released(lock: DirectoryLock) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while lock.is_held():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def _is_sampler(pid: int) -> bool:
    """Whether the process with this pid on this machine is a sampler. On a shared disk, another machine may hold the
    lock, and its pid is a different process here.
    """
    with contextlib.suppress(OSError):
        return b"--serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False
