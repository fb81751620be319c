import json
from pathlib import Path

import pytest

from simpletuner.runs.events import EventLog, NoticeEvent, read_events


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
