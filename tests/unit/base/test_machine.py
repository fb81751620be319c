"""What the machine has left: memory within its control groups, disk space, and GPUs as `nvidia-smi` lists them."""

from pathlib import Path

import pytest

from simpletuner.base import machine
from simpletuner.base.machine import Gpu, HostMemory, free_disk_bytes, gpus, host_memory, visible_gpus

MIB = 2**20


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that a kernel with 100 MiB available would show, for a process in the group jobs/one."""
    (tmp_path / "meminfo").write_text(f"MemTotal: {400 * 1024} kB\nMemAvailable:   {100 * 1024} kB\n")
    (tmp_path / "own").write_text("1:cpu:/\n0::/jobs/one\n")
    (tmp_path / "groups" / "jobs" / "one").mkdir(parents=True)
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
    return tmp_path


def limit(group: Path, *, most: str, used: int, pages: int) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {pages}\nactive_file {pages}\n")


def test_without_groups_memory_is_what_the_system_has(kernel: Path) -> None:
    assert host_memory() == HostMemory(400 * MIB, 100 * MIB)
    (kernel / "own").unlink()
    assert host_memory() == HostMemory(400 * MIB, 100 * MIB)


@pytest.mark.parametrize("group", ["groups/jobs/one", "groups/jobs", "groups"])
def test_the_tightest_group_decides_and_file_pages_are_available(kernel: Path, group: str) -> None:
    limit(kernel / "groups/jobs/one", most="max", used=MIB, pages=0)
    limit(kernel / group, most=str(60 * MIB), used=30 * MIB, pages=MIB)
    assert host_memory() == HostMemory(60 * MIB, 32 * MIB)


def test_a_system_that_does_not_say_has_no_known_memory(kernel: Path) -> None:
    (kernel / "meminfo").unlink()
    assert host_memory() is None


def test_room_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert abs(free_disk_bytes(tmp_path / "not" / "yet") - free_disk_bytes(tmp_path)) < 2**30


def smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_gpus_are_those_that_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 1024, 37\n1, NVIDIA GB10, 580.95.05, [N/A], [N/A], 0"
    smi(tmp_path, f"echo '{lines}'", monkeypatch)
    assert gpus() == (
        Gpu(0, "NVIDIA H100 80GB HBM3", "570.86.15", 81559 * MIB, 1024 * MIB, 37),
        Gpu(1, "NVIDIA GB10", "580.95.05", None, None, 0),
    )


@pytest.mark.parametrize("script", ["echo 'No devices were found'", "echo broken; exit 9", "echo ', , , , ,'"])
def test_no_gpus_where_the_driver_lists_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    smi(tmp_path, script, monkeypatch)
    assert gpus() == ()


def test_a_driver_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "GPU_QUERY_TIMEOUT_S", 0.1)
    smi(tmp_path, "exec sleep 60", monkeypatch)
    assert gpus() == ()


def test_without_nvidia_smi_there_are_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == ()


@pytest.mark.parametrize(
    ("listed", "count"),
    [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0, 3", 2), ("0,4,1", 1), ("GPU-8f1c,MIG-77", 2), ("1,1", 1)],
)
def test_visible_gpus_are_those_that_the_environment_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str | None, count: int
) -> None:
    smi(tmp_path, "for i in 0 1 2 3; do echo $i, NVIDIA H100, 570.86.15, 81559, 0, 0; done", monkeypatch)
    assert visible_gpus({} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}) == count


def test_torch_counts_where_a_driver_is_and_its_program_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(tmp_path, "exit 9", monkeypatch)
    monkeypatch.setattr(machine, "GPU_DRIVERS", (tmp_path / "none",))
    assert visible_gpus({}) == 0
    monkeypatch.setattr(machine, "GPU_DRIVERS", (tmp_path,))
    monkeypatch.setattr(machine, "_COUNT_BY_TORCH", "print(3)")
    assert visible_gpus({}) == 3
    monkeypatch.setattr(machine, "_COUNT_BY_TORCH", "raise SystemExit(1)")
    assert visible_gpus({}) == 0
