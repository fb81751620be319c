"""What a reporter tells: peak memory of phases, what a run was doing; and what becomes of what it cannot keep."""

from pathlib import Path

import pytest
import torch

from simpletuner.base.sizes import GIB
from simpletuner.memory import peak
from simpletuner.runs.events import Event, EventLog, PhaseEvent, read_events
from simpletuner.train.report import Reporter

MIB = 2**20


def take(mib: int) -> None:
    """Have that much more memory resident for a moment."""
    torch.ones(mib * MIB, dtype=torch.uint8)


def peaks_of(events: list[Event]) -> dict[str, int]:
    """The peak of each phase that ended, in MiB above the smallest of them."""
    ended = {event.phase: event.memory_gib for event in events if isinstance(event, PhaseEvent) and event.memory_gib}
    return {phase: round((used - min(ended.values())) * 1024) for phase, used in ended.items()}


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def reporter(events: list[Event]) -> Reporter:
    told = Reporter()
    told.listeners.append(events.append)
    return told


@pytest.mark.skipif(not peak.CLEAR_REFS.exists(), reason="this system does not let a process reset its peak")
def test_a_phase_has_its_own_peak_and_keeps_it_over_the_phases_inside_it(
    reporter: Reporter, events: list[Event]
) -> None:
    with reporter.phase("text"):
        take(400)
    with reporter.phase("latents"):
        pass
    with reporter.phase("train"):
        take(100)
        with reporter.phase("validation"):
            take(200)
        during = reporter.peak_memory().resident
    found = peaks_of(events)
    assert found["latents"] < 20
    assert found["text"] == pytest.approx(400, abs=30)
    assert found["train"] == pytest.approx(100, abs=30)
    assert found["validation"] == pytest.approx(200, abs=30)
    assert reporter.peak_memory().resident < during - 50 * MIB, "no phase goes on, and the last one is over"


def test_a_phase_that_ran_out_of_memory_stays_the_last_one_with_its_peak(reporter: Reporter) -> None:
    def exhaust() -> None:
        with reporter.phase("train"), reporter.phase("validation", "measuring the held-out loss") as progress:
            take(200)
            progress(3, 8)
            raise MemoryError

    with reporter.phase("scan"):
        before = reporter.peak_memory().resident
    with pytest.raises(MemoryError):
        exhaust()
    assert reporter.last_phase == "validation"
    assert reporter.activity == "measuring the held-out loss, 3 of 8 done"
    assert reporter.peak_memory().resident > before + 150 * MIB


def test_what_was_done_before_a_phase_is_done_again_after_it(reporter: Reporter) -> None:
    with reporter.phase("train"):
        reporter.activity = "training step 7 (1 × 64x64)"
        with reporter.phase("validation"):
            assert reporter.activity == "validating"
        assert reporter.activity == "training step 7 (1 × 64x64)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its memory is reported instead")
def test_on_a_cpu_no_allocated_memory_is_told(reporter: Reporter, events: list[Event]) -> None:
    with reporter.phase("scan"):
        pass
    begun, ended = (event for event in events if isinstance(event, PhaseEvent))
    assert (begun.memory_gib, begun.memory_allocated_gib, ended.memory_allocated_gib) == (None, None, None)
    assert ended.memory_gib == pytest.approx(reporter.peak_memory().resident / GIB, abs=0.05)


def test_a_log_that_cannot_be_written_is_given_up_with_one_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.log").symlink_to("/dev/full")
    heard: list[Event] = []
    with EventLog(tmp_path / "events.jsonl") as events:
        reporter = Reporter(events=events, log=tmp_path / "run.log")
        reporter.listeners.append(heard.append)
        for line in ("one", "two"):
            reporter.say(line)
        reporter.detail("three")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        "one",
        f"Note: {tmp_path / 'run.log'} cannot be written",
        "two",
    ]
    assert "No space left on device" in lines[1]
    assert [event["type"] for event in read_events(tmp_path / "events.jsonl")] == ["notice"] == [heard[0].type]
    assert len(heard) == 1


def test_a_name_that_is_no_utf_8_is_kept(tmp_path: Path) -> None:
    name = "picture-\udcff.png"
    with EventLog(tmp_path / "events.jsonl") as events:
        Reporter(events=events, log=tmp_path / "run.log").notice(name)
    assert (tmp_path / "run.log").read_text().endswith("Note: picture-\\udcff.png\n")
    assert [event["text"] for event in read_events(tmp_path / "events.jsonl")] == [name]
