"""Free memory of a device: on the CPU what the system and its control groups have left."""

from pathlib import Path

import pytest
import torch

from simpletuner.base import machine
from simpletuner.memory import free

CPU = torch.device("cpu")


def test_this_machine_has_some() -> None:
    assert free.free_memory_bytes(CPU) > 0


def test_the_cpu_has_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4096 kB\nMemAvailable: 1024 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "no groups")
    assert free.free_memory_bytes(CPU) == 2**20
