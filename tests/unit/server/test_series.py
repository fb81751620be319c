"""The index of a run's events: equal to reading each line as JSON, however the file came to be."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.runs.events import (
    CheckpointEvent,
    EndEvent,
    EventLog,
    NoticeEvent,
    PhaseEvent,
    ProgressEvent,
    RunEvent,
    StepEvent,
    ValidationEvent,
)
from simpletuner.server.series import (
    BLOCK_STEPS,
    CHUNK_BYTES,
    COLUMNS,
    RUNS_KEPT,
    DamagedText,
    EventIndex,
    EventIndexes,
    decoded,
)

RUN = RunEvent(program="simpletuner 1", pid=1, resumed_from=None, steps=9, pictures=6, trainable=100)


def step(number: int, loss: float = 0.5, **more: Any) -> StepEvent:
    return StepEvent(step=number, epoch=0, loss=loss, lr=1e-4, grad_norm=1.0, seconds=0.1, memory_gib=2.5, **more)


def read_plainly(path: Path) -> dict[str, list[Any]]:
    """The columns as the docs say to read them: of each step the last line."""
    rows: dict[int, list[Any]] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("type") == "step" and isinstance(event.get("id"), int):
            rows[event["step"]] = [event.get(name) for name in COLUMNS]
    ordered = [rows[number] for number in sorted(rows)]
    finite = [[None if isinstance(x, float) and not math.isfinite(x) else x for x in row] for row in ordered]
    return {name: [row[at] for row in finite] for at, name in enumerate(COLUMNS)}


def columns(index: EventIndex) -> dict[str, Any]:
    series = json.loads(index.series(), parse_constant=pytest.fail)
    return {name: series[name] for name in COLUMNS}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.mark.parametrize("count", [1000, pytest.param(4000, marks=pytest.mark.slow)])
def test_columns_are_what_json_reads_of_any_events(path: Path, count: int) -> None:
    draw = random.Random(1)
    numbers: list[Callable[[], Any]] = [
        draw.random,
        lambda: draw.random() * 10.0 ** draw.randint(-320, 300),
        lambda: -draw.random(),
        lambda: draw.randint(-9, 9),
        lambda: 0.0,
        lambda: math.nan,
        lambda: -math.inf,
        lambda: None,
    ]
    texts = ["\u2028 line", 'a "quote" \\', '{"type": "step", "step": 4}', "ü 🙂", "\ttab\u0000", "NaN"]
    lines = []
    for number in range(1, count):
        values = {name: draw.choice(numbers)() for name in COLUMNS}
        event = {"v": 1, "id": number, "time": "2026-01-01T00:00:00.000+00:00", "attempt": 1, "type": "step"}
        event |= values | {"step": draw.randint(1, 3000), "epoch": 0, "rollout_calls": 0}
        if draw.random() < 0.5:  # as EventLog has it
            order = ["v", "id", "time", "attempt", "type", "step", "epoch", "loss", "lr", "grad_norm", "seconds"]
            event = {key: event[key] for key in [*order, "rollout_calls", "memory_gib"]}
        elif draw.random() < 0.5:
            event["new key"] = draw.choice(texts)
        else:
            event = {**event, "type": "notice", "text": draw.choice(texts)}
        is_ascii = draw.random() < 0.5
        lines.append(json.dumps(event, ensure_ascii=is_ascii, separators=draw.choice([None, (",", ":")])))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    index = EventIndex(path)
    assert columns(index) == read_plainly(path)
    assert index.refresh().damaged == 0


def test_the_lines_of_the_log_take_the_quick_way_and_keep_every_digit(path: Path) -> None:
    with EventLog(path) as log:
        for number in range(1, 3000):
            log.emit(step(number, loss=random.Random(number).random(), rollout_calls=2))
    text = EventIndex(path).series()
    assert json.loads(text)["loss"] == [random.Random(number).random() for number in range(1, 3000)]
    index = EventIndex(path)
    index.refresh()
    index._take_other = pytest.fail  # type: ignore[method-assign, assignment]
    index._clear()
    assert json.loads(index.series())["step"] == list(range(1, 3000))


def test_a_start_that_was_refused_is_no_attempt_and_has_its_own_phases(path: Path) -> None:
    refused = (PhaseEvent(phase="scan", state="begin"), EndEvent(reason="error", exit_code=3, step=0, seconds=1))
    for events in ([RUN, PhaseEvent(phase="train", state="begin"), step(1)], refused, refused):
        with EventLog(path) as log:
            for event in events:
                log.emit(event)
    told = EventIndex(path).refresh()
    assert (told.attempts, told.starts, list(told.phases)) == (1, 3, ["scan"])
    with EventLog(path) as log:
        log.emit(RUN)
    assert EventIndex(path).refresh().attempts == 2


RATES = ("images_per_s", "tflop_per_s", "mfu", "hfu")


@pytest.mark.parametrize("rates", [{}, dict.fromkeys(RATES), dict.fromkeys(RATES, 0.25)])
def test_steps_with_and_without_rates_take_the_quick_way(path: Path, rates: dict[str, Any]) -> None:
    """Files from before there were rates lack them; on a CPU some are null."""
    event = {key: value for key, value in step(1).model_dump().items() if key not in RATES} | rates
    head = {"v": 1, "id": 1, "time": "2026-01-01T00:00:00.000+00:00", "attempt": 1}
    path.write_text(json.dumps(head | {"type": "step"} | event) + "\n")
    index = EventIndex(path)
    index._take_other = pytest.fail  # type: ignore[method-assign, assignment]
    assert json.loads(index.series())["loss"] == [0.5]


def test_bytes_are_read_once_and_a_torn_line_waits(path: Path) -> None:
    index = EventIndex(path)
    assert index.refresh().last_id == 0
    with EventLog(path) as log:
        log.emit(RUN)
        log.emit(step(1))
    assert index.refresh().last_id == 2
    line = json.dumps({"v": 1, "id": 3, "time": "", "attempt": 1} | step(2).model_dump()) + "\n"
    with path.open("a") as file:
        file.write(line[:50])
        file.flush()
        assert index.refresh().last_id == 2
        file.write(line[50:])
    place = index.position(2)[0]
    assert index.refresh().last_id == 3
    assert path.read_bytes()[place:].decode() == line
    # What was read before is not looked at again.
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(b"#" * place)
    assert columns(index)["step"] == [1, 2]
    assert len(data) == path.stat().st_size


def test_a_later_attempt_replaces_the_steps_it_comes_to_again(path: Path) -> None:
    last = BLOCK_STEPS + 20
    with EventLog(path) as log:
        for number in range(1, last + 1):
            log.emit(step(number, loss=1.0))
    index = EventIndex(path)
    index.refresh()
    with EventLog(path) as log:
        log.emit(RUN)
        for number in range(BLOCK_STEPS - 10, BLOCK_STEPS + 11):
            log.emit(step(number, loss=2.0))
    expected = [1.0] * (BLOCK_STEPS - 11) + [2.0] * 21 + [1.0] * 10
    assert columns(index)["loss"] == columns(EventIndex(path))["loss"] == expected
    assert columns(index)["step"] == list(range(1, last + 1))
    assert index.refresh().attempts == 2


def test_a_file_that_is_cut_or_replaced_is_read_anew(path: Path) -> None:
    with EventLog(path) as log:
        for number in range(1, 9):
            log.emit(step(number))
    index = EventIndex(path)
    index.refresh()
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\n") + 1])
    assert (columns(index)["step"], index.refresh().last_id) == ([1], 1)
    other = path.with_name("other")
    other.write_bytes(data)
    other.replace(path)
    assert columns(index)["step"] == list(range(1, 9))
    path.unlink()
    assert (columns(index)["step"], index.refresh().last_id) == ([], 0)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"nul",
        b'{"v": 1, "id": "x", "attempt": 1, "type": "step", "step": 2}',
        b'{"v": 1, "id": 2, "attempt": 1, "type": "step", "step": 0}',
        b'{"v": 1, "id": 2, "attempt": 1, "type": "step", "step": true}',
        b'{"v": 1, "id": 2, "attempt": 1, "type": "phase", "phase": "sleep", "state": "begin"}',
        b'{"v": 1, "id": 2, "attempt": 1, "type": "notice", "text": "\\ud800"}',
        b'{"v": 1, "id": 2, "attempt": 1, "type": "validation", "step": 1, "loss": "low"}',
        b'{"v": 1, "id": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"\xff\xfe",
        bytes(300),
    ],
)
def test_a_damaged_line_is_passed_over_and_counted(path: Path, line: bytes) -> None:
    with EventLog(path) as log:
        log.emit(step(1))
    with path.open("ab") as file:
        file.write(line + b"\n")
    with EventLog(path.with_name("more")) as log:
        for number in range(2, 5):
            log.emit(step(number))
    with path.open("ab") as file:
        file.write(path.with_name("more").read_bytes())
    index = EventIndex(path)
    assert columns(index)["step"] == [1, 2, 3, 4]
    assert index.refresh().damaged == 1


def test_an_event_of_a_later_version_is_no_damage(path: Path) -> None:
    path.write_text('{"v": 2, "id": 1, "attempt": 1, "type": "weather", "sky": "blue"}\n')
    told = EventIndex(path).refresh()
    assert (told.last_id, told.damaged) == (1, 0)


def test_what_is_no_step_is_told(path: Path) -> None:
    with EventLog(path) as log:
        log.emit(RUN)
        log.emit(PhaseEvent(phase="text", state="begin"))
        log.emit(ProgressEvent(phase="text", done=1, total=2, per_s=1.0, eta_s=1.0))
        log.emit(PhaseEvent(phase="text", state="end", seconds=2.0, memory_gib=1.0))
        log.emit(ValidationEvent(step=0, loss=0.9, ema_loss=0.8))
        log.emit(ValidationEvent(step=0, sheet="validation/step-000000/sheet.png", drift=0.0))
        log.emit(CheckpointEvent(step=5, state="saved", path="checkpoints/step-000005", bytes=3))
        log.emit(NoticeEvent(text="first"))
        log.emit(EndEvent(reason="stopped", exit_code=75, step=5, seconds=3.0))
    index = EventIndex(path)
    told = index.refresh()
    text = told.phases["text"]
    assert (text.state, text.seconds, text.progress and text.progress.done) == ("end", 2.0, 1)
    series = json.loads(index.series())
    assert series["held_out"] == {"step": [0], "loss": [0.9], "ema_loss": [0.8]}
    assert series["drift"] == {"step": [0], "drift": [0.0], "ema_drift": [None]}
    with EventLog(path) as log:
        log.emit(RUN)
        log.emit(ValidationEvent(step=0, loss=0.7))
        log.emit(NoticeEvent(text="second"))
    told = index.refresh()
    # The new attempt has its own phases and notices; pictures and checkpoints stay.
    assert (told.attempts, told.phases, told.notices) == (2, {}, ["second"])
    assert len(told.validations) == 2
    assert len(told.checkpoints) == 1
    assert json.loads(index.series())["held_out"]["loss"] == [0.7]


def test_a_place_is_found_in_a_long_file(path: Path) -> None:
    with EventLog(path) as log:
        for number in range(1, 4001):
            log.emit(step(number))
    data = path.read_bytes()
    assert len(data) > 3 * CHUNK_BYTES
    index = EventIndex(path)
    for after in (0, 1, 1100, 2500, 3999, 4000):
        offset, is_known = index.position(after)
        rest = data[offset:].splitlines()
        assert is_known
        assert [json.loads(line)["id"] for line in rest[:1]] == ([] if after == 4000 else [after + 1])
    assert index.position(4001) == (0, False)


def test_indexes_of_few_runs_are_kept(tmp_path: Path) -> None:
    indexes = EventIndexes()
    first = indexes.of(tmp_path / "0")
    for number in range(1, RUNS_KEPT):
        indexes.of(tmp_path / str(number))
    assert indexes.of(tmp_path / "0") is first
    for number in range(1, RUNS_KEPT + 1):
        indexes.of(tmp_path / str(number))
    assert indexes.of(tmp_path / "0") is not first


@pytest.mark.parametrize(("text", "value"), [("[NaN, -Infinity, 1e999, 1.5]", [None, None, None, 1.5]), ("{}", {})])
def test_numbers_that_are_no_json_become_null(text: str, value: object) -> None:
    assert decoded(text) == value


def test_half_a_surrogate_pair_is_damage() -> None:
    with pytest.raises(DamagedText):
        decoded('"\\udfff"')
