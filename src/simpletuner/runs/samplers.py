"""Processes that keep a model on the GPU to draw with: a run ends them to have the memory."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from simpletuner.base.files import DirectoryLock

SAMPLERS_FOLDER = Path(".simpletuner") / "samplers"
"""Of a workspace: a file for each, `GPU.PID.lock`, which the process holds."""
_PATIENCE_S = 5.0
_LOOK_EVERY_S = 0.05


@contextlib.contextmanager
def known_as_sampler(workspace: Path, environ: Mapping[str, str]) -> Iterator[None]:
    """Inside, this process is ended by a run that starts in `workspace` on the same GPU.

    Raises:
        DiskError: the disk is full or read-only.
    """
    lock = DirectoryLock(workspace / SAMPLERS_FOLDER / f"{first_gpu(environ)}.{os.getpid()}.lock")
    with lock:
        try:
            yield
        finally:
            lock.path.unlink(missing_ok=True)


def end_samplers(workspace: Path, environ: Mapping[str, str], report: Callable[[str], None]) -> None:
    """End the samplers of `workspace` that have a GPU this run computes on, and wait until they are gone."""
    folder = workspace / SAMPLERS_FOLDER
    for path in sorted(path for gpu in run_gpus(environ) for path in folder.glob(f"{gpu}.*.lock")):
        lock = DirectoryLock(path)
        pid = lock.pid()
        if pid is not None and lock.is_held() and _is_sampler(pid):
            report(f"Process {pid}, which kept a model to draw with, is ended: this run takes its memory.")
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
                if _is_let_go(lock):
                    break
        if not lock.is_held():
            path.unlink(missing_ok=True)  # left behind by one that was killed


def first_gpu(environ: Mapping[str, str]) -> str:
    """The GPU on which a process computes, as CUDA_VISIBLE_DEVICES has it; 0 where that is not set."""
    return environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip().replace("/", "_") or "0"


def run_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs of a run of LOCAL_WORLD_SIZE processes on this machine, as CUDA_VISIBLE_DEVICES has them."""
    count = environ.get("LOCAL_WORLD_SIZE", "1")
    if count == "1" or not count.isdecimal():
        return [first_gpu(environ)]
    listed = environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(int(count))))
    return [name.strip().replace("/", "_") for name in listed.split(",")[: int(count)]]


def _is_let_go(lock: DirectoryLock) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while lock.is_held():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def _is_sampler(pid: int) -> bool:
    """Whether the process of that number is one of ours, as far as the system tells: on a shared disk, a lock may be
    held by another machine, where its number means another process.
    """
    with contextlib.suppress(OSError):
        return b"--serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False
