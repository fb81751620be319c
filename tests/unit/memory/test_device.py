"""fp32 is fp32 wherever a command computes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simpletuner.memory.device import choose_device, forbid_tf32
from simpletuner.memory.world import World

SOURCE = Path(__file__).parents[3] / "src"


def allowed() -> tuple[bool, bool]:
    """Whether products and convolutions may use TF32."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    """TF32 allowed to both, and afterwards what was before."""
    before = allowed()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    assert allowed() == (True, True)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("open_device", [forbid_tf32, choose_device, World.single])
def test_tf32_is_forbidden_with_the_choice_of_the_device(open_device: object) -> None:
    assert callable(open_device)
    open_device()
    assert allowed() == (False, False)


@pytest.mark.slow  # a process of its own; choosing the device is tested above in this one
def test_products_of_fp32_stay_fp32_in_nvidias_containers() -> None:
    """The variable is read when torch is imported."""
    script = (
        "import torch; from simpletuner.memory.device import choose_device; "
        "before = torch.backends.cuda.matmul.allow_tf32; choose_device(); "
        "print(before, torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())"
    )
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False", "highest"]


def test_no_command_chooses_its_device_by_itself() -> None:
    """So that none forgets to forbid TF32."""
    choices = [
        path.relative_to(SOURCE).as_posix()
        for path in sorted(SOURCE.rglob("*.py"))
        if 'torch.device("cuda" if' in path.read_text(encoding="utf-8")
    ]
    assert choices == ["simpletuner/memory/device.py"]
