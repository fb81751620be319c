"""The processes of a run, as the system shows them."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S = 120
LISTENS = "0A"
"""State of a socket in /proc/net/tcp."""


def until(is_so: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """In the order in which they were started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for task in tasks for child in task.read_text().split())


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and the last line on the screen."""
    errors = process.communicate(timeout=TIMEOUT_S)[1].strip().splitlines()
    return process.returncode, errors[-1] if errors else ""


def listening(pids: list[int]) -> set[str]:
    """Addresses, in hexadecimal, on which these processes listen."""
    found = set()
    for pid in pids:
        sockets = {os.readlink(handle) for handle in Path(f"/proc/{pid}/fd").iterdir() if handle.is_symlink()}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTENS and f"socket:[{words[9]}]" in sockets:
                    found.add(words[1].partition(":")[0])
    return found
