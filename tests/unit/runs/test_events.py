import json
import resource
import signal
from pathlib import Path

import pytest
from tests.file_faults import files_of_at_most

from simpletuner.base.errors import DiskError
from simpletuner.runs.events import EventLog, NoticeEvent, StepEvent, last_losses, read_appended, read_events


def notice(log: EventLog, text: str) -> None:
    log.emit(NoticeEvent(text=text))


def test_ids_go_on_without_a_gap_and_attempts_count(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        notice(log, "one")
        notice(log, "two")
    with EventLog(path) as log:
        notice(log, "three")
    events = list(read_events(path))
    assert [event["id"] for event in events] == [1, 2, 3]
    assert [event["attempt"] for event in events] == [1, 1, 2]
    assert [event["text"] for event in events] == ["one", "two", "three"]
    assert all(event["v"] == 1 and event["type"] == "notice" and event["time"].endswith("+00:00") for event in events)


def took(step: int, loss: float) -> StepEvent:
    return StepEvent(step=step, epoch=0, loss=loss, lr=1e-4, grad_norm=1, seconds=0.25, memory_gib=1)


def test_the_last_losses_are_those_of_the_steps_that_count(tmp_path: Path) -> None:
    """A run that was killed after step 4 goes on from step 3, and again from step 5."""
    path = tmp_path / "events.jsonl"
    assert last_losses(path, 5, 3) == []
    for steps in ({1: 0.1, 2: 0.2, 3: 0.3, 4: 9.0}, {4: 0.4, 5: 0.5, 6: 9.0}):
        with EventLog(path) as log:
            for step, loss in steps.items():
                log.emit(took(step, loss))
                log.emit(NoticeEvent(text='of "type": "step"'))
    assert last_losses(path, 5, 3) == [0.3, 0.4, 0.5]
    assert last_losses(path, 5, 20) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert last_losses(path, 0, 20) == []


@pytest.mark.parametrize("torn", ['{"v": 1, "id": 3, "ti', "x" * 200_000])
def test_a_torn_last_line_is_cut_and_its_id_used_again(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        notice(log, "one")
        notice(log, "two")
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    assert [event["id"] for event in read_events(path)] == [1, 2]
    with EventLog(path) as log:
        notice(log, "three")
    assert path.read_bytes().startswith(whole)
    assert [event["id"] for event in read_events(path)] == [1, 2, 3]


def test_an_event_that_does_not_fit_on_the_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        notice(log, "one")
        with (
            files_of_at_most(path.stat().st_size + 40),
            pytest.raises(DiskError, match=r"cannot write .*events\.jsonl"),
        ):
            notice(log, "two")
        notice(log, "three")
    assert [(event["id"], event["text"]) for event in read_events(path)] == [(1, "one"), (2, "three")]


def test_an_event_that_did_not_fit_is_not_written_again_when_the_log_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with pytest.raises(DiskError, match="File too large"), files_of_at_most(40), EventLog(path) as log:
        notice(log, "one")
    assert path.read_bytes() == b""


def test_a_file_that_is_nothing_but_a_torn_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"v": 1')
    with EventLog(path) as log:
        notice(log, "one")
    assert [event["id"] for event in read_events(path)] == [1]


def test_a_last_line_longer_than_a_block_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        notice(log, "long " * 40_000)
    with EventLog(path) as log:
        assert log.attempt == 2
        notice(log, "next")
    assert [event["id"] for event in read_events(path)] == [1, 2]


def test_reading_goes_on_after_an_id(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for text in "abc":
            notice(log, text)
    assert [event["text"] for event in read_events(path, after=2)] == ["c"]
    assert list(read_events(tmp_path / "none.jsonl")) == []


def test_every_line_is_json_with_the_users_own_letters(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        notice(log, "größer\nzweite Zeile")
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["text"] == "größer\nzweite Zeile"


DAMAGED_LINES = {
    "blank": b"\n",
    "spaces": b"   \n\n",
    "no JSON": b'{"v": 1, "id": 3, "ti\n',
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "no id": b'{"v": 1, "type": "notice"}\n',
    "an id that is no number": b'{"id": "3", "attempt": 1, "type": "notice", "time": ""}\n',
    "NULs": b"\0" * 5000 + b"\n",
    "NULs without an end": b"\0" * 5000,
    "no UTF-8": b'{"id": 3, \xff\xfe}\n',
    "deep": b"[" * 100_000 + b"\n",
    "a long one": b"x" * 600_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGED_LINES.values(), ids=DAMAGED_LINES.keys())
def test_a_damaged_last_line_is_left_and_ids_go_on(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        notice(log, "one")
        notice(log, "two")
    whole = path.read_bytes()
    path.write_bytes(whole + damage)
    with EventLog(path) as log:
        assert log.attempt == 2
        notice(log, "three")
    kept = whole + (damage if damage.endswith(b"\n") else b"")
    assert path.read_bytes().startswith(kept)
    assert [event["id"] for event in read_events(path)] == [1, 2, 3]
    assert [event["id"] for event in read_appended(path, 0)[0]] == [1, 2, 3]


def test_a_file_of_damaged_lines_alone_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(damage for damage in DAMAGED_LINES.values() if damage.endswith(b"\n")))
    with EventLog(path) as log:
        notice(log, "one")
    assert [(event["id"], event["attempt"]) for event in read_events(path)] == [(1, 1)]


def test_only_the_types_asked_for_are_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        notice(log, 'of "type": "step"')
    assert list(read_events(path, kinds=("step",))) == []
    assert len(list(read_events(path, kinds=("notice",)))) == 1


def test_events_that_cannot_be_opened_are_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(DiskError, match=r"events\.jsonl: Is a directory"):
        EventLog(tmp_path / "events.jsonl")


def test_a_line_that_the_disk_refuses_leaves_nothing_and_its_id_is_used_again(tmp_path: Path) -> None:
    """The limit of a file's size stands for a full disk: the kernel writes what fits, then refuses."""
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        notice(log, "one")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, before[1]))
        try:
            with pytest.raises(DiskError, match="File too large"):
                notice(log, "two" * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        notice(log, "three")
    assert [(event["id"], event["text"]) for event in read_events(path)] == [(1, "one"), (2, "three")]


def test_a_name_that_is_no_utf_8_can_be_told(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        notice(log, "a\udcff.png")
    assert [event["text"] for event in read_events(path)] == ["a\udcff.png"]


def test_a_start_whose_process_is_gone_can_be_ended_by_another(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        notice(log, "one")
    with EventLog(path, is_new_start=False) as log:
        notice(log, "two")
    events = list(read_events(path))
    assert [(event["id"], event["attempt"], event["start"]) for event in events] == [(1, 1, 1), (2, 1, 1)]
