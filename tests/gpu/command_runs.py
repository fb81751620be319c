"""The real command, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_command(
    folder: Path, *arguments: str, kill_at: str | None = None, deterministic: bool = False
) -> subprocess.CompletedProcess[str]:
    """`simpletuner ARGUMENTS` in `folder`. With `kill_at`, such as "step:3", a `train` that kills itself there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(folder / "caches")}
    command = [sys.executable, "-m", "simpletuner", *arguments]
    if deterministic:
        command = [sys.executable, str(HERE / "deterministic_command.py"), kill_at or "never", *arguments]
    elif kill_at is not None:
        command = [sys.executable, str(HERE.parent / "recipes" / "killed.py"), kill_at, *arguments[1:]]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
