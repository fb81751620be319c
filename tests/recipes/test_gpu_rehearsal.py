"""tests/gpu where there is no GPU: skipped for one reason, and rehearsed, so that they do not rot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CHEAP = "velocity or attention or (bits and all) or (bits and disk) or four_steps or waits or (trained and streamed)"
"""Of each file but the one of whole runs something. What compiles or starts processes is left out."""


def pytest_of_gpu(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-P", "-m", "pytest", "-q", *flags, str(ROOT / "tests" / "gpu")]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | own | environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.slow
def test_without_a_gpu_all_are_skipped_for_one_reason() -> None:
    done = pytest_of_gpu()
    assert done.returncode == 0, done.stdout + done.stderr
    (reason,) = (line for line in done.stdout.splitlines() if line.startswith("SKIPPED"))
    assert reason.endswith("needs a CUDA GPU")
    assert " passed" not in done.stdout


@pytest.mark.slow
def test_a_rehearsal_passes_on_the_cpu() -> None:
    done = pytest_of_gpu("-k", CHEAP, PYTEST_SIMPLETUNER_DEVICE="cpu")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    assert " passed" in done.stdout
