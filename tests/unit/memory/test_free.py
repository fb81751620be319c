"""Free memory is the least of what the system and the groups around this process have left."""

from pathlib import Path

import pytest
import torch

from simpletuner.memory import free

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that a kernel with 100 MiB available would show, for a process in the group jobs/one."""
    (tmp_path / "meminfo").write_text(f"MemTotal: {400 * 1024} kB\nMemAvailable:   {100 * 1024} kB\n")
    (tmp_path / "own").write_text("1:cpu:/\n0::/jobs/one\n")
    (tmp_path / "groups" / "jobs" / "one").mkdir(parents=True)
    monkeypatch.setattr(free, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(free, "CGROUPS", tmp_path / "groups")
    return tmp_path


def limit(group: Path, *, most: str, used: int, pages: int) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {pages}\nactive_file {pages}\n")


def test_without_groups_it_is_what_the_system_has(machine: Path) -> None:
    assert free.free_memory_bytes(CPU) == 100 * MIB
    (machine / "own").unlink()
    assert free.free_memory_bytes(CPU) == 100 * MIB


@pytest.mark.parametrize("group", ["groups/jobs/one", "groups/jobs", "groups"])
def test_the_tightest_group_decides_and_file_pages_are_free(machine: Path, group: str) -> None:
    limit(machine / "groups/jobs/one", most="max", used=MIB, pages=0)
    limit(machine / group, most=str(60 * MIB), used=30 * MIB, pages=MIB)
    assert free.free_memory_bytes(CPU) == 32 * MIB


def test_this_machine_has_some() -> None:
    assert free._available() > 0
    assert 0 < free.free_memory_bytes(CPU) <= free._available()
