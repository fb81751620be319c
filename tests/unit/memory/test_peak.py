"""Peak memory of a span of time. The accelerator's is in tests/gpu."""

from pathlib import Path

import pytest
import torch

from simpletuner.memory import peak
from simpletuner.memory.peak import PeakMemory, read_peak_memory, reset_peak_memory

MIB = 2**20
CAN_RESET = peak.CLEAR_REFS.exists()


def take(mib: int) -> None:
    """Have that much more memory resident for a moment."""
    torch.ones(mib * MIB, dtype=torch.uint8)


@pytest.mark.skipif(not CAN_RESET, reason="this system does not let a process reset its peak")
def test_a_span_has_its_own_peak() -> None:
    reset_peak_memory()
    before = read_peak_memory().resident
    take(300)
    high = read_peak_memory().resident
    assert high - before > 280 * MIB
    reset_peak_memory()
    assert read_peak_memory().resident < high - 250 * MIB
    assert read_peak_memory().reserved is read_peak_memory().allocated is None


def test_where_a_peak_cannot_be_reset_it_is_that_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peak, "CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    take(300)
    high = read_peak_memory().resident
    reset_peak_memory()
    assert read_peak_memory().resident >= high - MIB


def test_where_the_status_has_no_peak_the_systems_accounts_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t   100 kB\n")
    monkeypatch.setattr(peak, "PROCESS_STATUS", tmp_path / "status")
    assert read_peak_memory().resident > 50 * MIB


def test_two_spans_together() -> None:
    cpu, card = PeakMemory(5 * MIB), PeakMemory(3 * MIB, 2048 * MIB, 1024 * MIB)
    assert cpu.combined(card) == PeakMemory(5 * MIB, 2048 * MIB, 1024 * MIB)
    assert card.combined(PeakMemory(0, 1, 1536 * MIB)).allocated == 1536 * MIB
    assert cpu.combined(PeakMemory(6 * MIB)) == PeakMemory(6 * MIB)
    assert (card.used_gib, card.allocated_gib) == (2.0, 1.0)
    assert (PeakMemory(512 * MIB).used_gib, cpu.allocated_gib) == (0.5, None)
