"""In-memory index of a run's events file: step events as columns for the curves, other events as they are.

Each read continues where the last one ended, so each byte is parsed once. The curves stay text: a number is copied from
the event's line into the response, neither parsed nor rounded. That makes 100,000 steps fast.
"""

import bisect
import itertools
import json
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from pydantic import ValidationError

from simpletuner.runs.events import (
    EVENTS,
    SCHEMA_VERSION,
    CheckpointEvent,
    Event,
    NoticeEvent,
    PhaseEvent,
    PlanEvent,
    ProgressEvent,
    StepEvent,
    ValidationEvent,
    start_of,
)

COLUMNS = ("step", "loss", "lr", "grad_norm", "seconds", "memory_gib")
"""Keys of a `step` event that become columns: the step number and the curves."""
CHUNK_BYTES = 256 * 1024
"""Bytes read at once; parsing them holds the GIL for about a millisecond."""
BLOCK_STEPS = 1024
"""Steps per text block; when a later attempt overwrites steps, whole blocks are rebuilt."""
NOTICES_KEPT = 200
RUNS_KEPT = 8

Row = tuple[str, ...]
"""One step's columns, each as JSON text."""

_COUNT = r"[1-9][0-9]{0,17}"
_INTEGER = f"(?:0|{_COUNT})"
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"


def _line_pattern() -> re.Pattern[str]:
    """Match a whole line: a step event as `EventLog` writes it, split into id and columns, or any other line."""
    head = [f'"v": {SCHEMA_VERSION}', f'"id": (?P<id>{_INTEGER})', r'"time": "[0-9T:.+-]*"', f'"attempt": {_INTEGER}']
    pattern = r"\{" + ", ".join(head) + f'(?:, "start": {_INTEGER})?'  # missing in files of older releases
    for name, described in StepEvent.model_fields.items():
        if name == "type":
            pattern += ', "type": "step"'
            continue
        number = _COUNT if name == "step" else _INTEGER if described.annotation is int else _NUMBER
        if name in COLUMNS:
            pattern += f', "{name}": (?P<{name}>{number})'
        elif described.is_required():
            pattern += f', "{name}": {number}'
        else:  # missing in files of older releases
            pattern += f'(?:, "{name}": (?:{number}|null))?'
    return re.compile(pattern + r"\}\n|(?P<other>[^\n]*)\n")


_LINE = _line_pattern()
_ID = _LINE.groupindex["id"] - 1
_OTHER = _LINE.groupindex["other"] - 1
_COLUMN_GROUPS = tuple(_LINE.groupindex[name] - 1 for name in COLUMNS)


class DamagedText(Exception):
    """The text is not JSON, or the line is not an event."""


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


# Python writes NaN and infinities, which JSON does not allow; the page gets null.
_DECODER = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite)


def decoded(text: str) -> Any:
    """Parse JSON into a value that can be sent; numbers that are not finite become None.

    Raises:
        DamagedText: it is not JSON, or UTF-8 cannot encode it.
    """
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:  # an unpaired surrogate can be parsed but not encoded
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise DamagedText from None
    return value


def parsed(line: str) -> dict[str, Any]:
    """Parse the event in `line`; numbers that are not finite become None.

    Raises:
        DamagedText: it is not an event.
    """
    event = decoded(line)
    if not isinstance(event, dict):
        raise DamagedText
    if type(event.get("id")) is not int or type(event.get("attempt")) is not int:
        raise DamagedText
    return event


def whole_lines(file: BinaryIO, offset: int) -> bytes:
    """Read complete lines from `offset` on, about `CHUNK_BYTES`; empty if no line is complete yet."""
    size = CHUNK_BYTES
    while True:
        file.seek(offset)
        data = file.read(size)
        end = data.rfind(b"\n") + 1
        if end or len(data) < size:
            return data[:end]
        size *= 2


def split(data: bytes) -> Iterator[Sequence[str]]:
    """Yield the `_LINE` groups of all lines."""
    # Invalid UTF-8 is replaced, so that a damaged line does not affect the others.
    yield from _LINE.findall(data.decode(errors="replace"))


def events_in(data: bytes) -> Iterator[tuple[int, str]]:
    """Yield id and JSON text of each event in `data`, skipping damaged lines. The text contains no line break."""
    lines = data.decode(errors="replace")
    for match in _LINE.finditer(lines):
        if match["id"]:
            yield int(match["id"]), match[0][:-1]
            continue
        text = match["other"].strip()
        try:
            event = parsed(text)
        except DamagedText:
            continue
        if "NaN" in text or "Infinity" in text or "\r" in text:
            text = json.dumps(event, ensure_ascii=False)
        yield event["id"], text


@dataclass
class _Block:
    """A range of steps: each column holds its values joined by commas; the first column is the step numbers."""

    last_step: int = 0
    columns: list[str] = field(default_factory=lambda: [""] * len(COLUMNS))

    def add(self, steps: list[int], rows: list[Row]) -> None:
        if steps[0] <= self.last_step or any(after <= before for before, after in itertools.pairwise(steps)):
            old_rows = zip(*(column.split(",") for column in self.columns), strict=True) if self.last_step else ()
            merged = {int(row[0]): row for row in itertools.chain(old_rows, rows)}
            steps = sorted(merged)
            rows = [merged[step] for step in steps]
            self.columns = [""] * len(COLUMNS)
        self.last_step = steps[-1]
        added = map(",".join, zip(*rows, strict=True))
        self.columns = [f"{old},{new}" if old else new for old, new in zip(self.columns, added, strict=True)]


class Columns:
    """A run's curves. A later row of the same step replaces an earlier one."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows in file order."""
        numbers = [int(row[0]) for row in rows]
        start = 0
        for block, group in itertools.groupby(numbers, key=lambda step: step // BLOCK_STEPS):
            steps = list(group)
            self._blocks.setdefault(block, _Block()).add(steps, list(rows[start : start + len(steps)]))
            start += len(steps)

    def json(self) -> Iterator[tuple[str, str]]:
        """Yield each column's name and JSON array."""
        blocks = [self._blocks[key] for key in sorted(self._blocks)]
        for index, name in enumerate(COLUMNS):
            yield name, f"[{','.join(block.columns[index] for block in blocks)}]"


@dataclass
class PhaseState:
    """Progress of a phase of the last start."""

    phase: str
    state: Literal["begin", "end"] = "begin"
    seconds: float | None = None
    memory_gib: float | None = None
    progress: ProgressEvent | None = None


@dataclass
class EventSummary:
    """Summary of all events other than steps."""

    last_id: int = 0
    attempts: int = 0
    """Number of starts, without those that failed before training."""
    starts: int = 0
    plan: PlanEvent | None = None
    phases: dict[str, PhaseState] = field(default_factory=dict)
    """Phases of the last start, in the order they began."""
    validations: dict[tuple[int, bool], ValidationEvent] = field(default_factory=dict)
    """By (step, whether the event holds a loss); a later event replaces an earlier one."""
    checkpoints: list[CheckpointEvent] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    """Notices of the last start."""
    damaged: int = 0
    """Number of lines that are not events."""

    def copy(self) -> Self:
        """Return a snapshot that later events do not change."""
        return replace(
            self,
            phases={name: replace(phase) for name, phase in self.phases.items()},
            validations=dict(self.validations),
            checkpoints=list(self.checkpoints),
        )

    def take(self, line: dict[str, Any]) -> None:
        """Add one event that is not a step.

        Raises:
            DamagedText: a key is missing or wrong.
        """
        if start_of(line) > self.starts:
            self.starts, self.attempts = start_of(line), line["attempt"]
            self.phases, self.notices = {}, []
        if line.get("type") == "end" and line.get("reason") == "error" and "start" in line:
            self.attempts = line["attempt"] - ("train" not in self.phases)
        if line.get("type") not in _SUMMARIZED:
            return
        try:
            event = EVENTS[line["type"]].model_validate(line, extra="ignore")
        except ValidationError:
            raise DamagedText from None
        self._add(event)

    def _add(self, event: Event) -> None:
        match event:
            case PlanEvent():
                self.plan = event
            case PhaseEvent(state="begin"):
                self.phases[event.phase] = PhaseState(event.phase)
            case PhaseEvent():
                before = self.phases.get(event.phase, PhaseState(event.phase))
                self.phases[event.phase] = PhaseState(
                    event.phase, event.state, event.seconds, event.memory_gib, before.progress
                )
            case ProgressEvent():
                self.phases.setdefault(event.phase, PhaseState(event.phase)).progress = event
            case ValidationEvent():
                self.validations[event.step, event.loss is not None] = event
            case CheckpointEvent():
                self.checkpoints.append(event)
            case NoticeEvent():
                self.notices = [*self.notices[1 - NOTICES_KEPT :], event.text]


_SUMMARIZED = ("plan", "phase", "progress", "validation", "checkpoint", "notice")
"""Types of the events that `EventSummary` reads. Others are in the run's status, or were written by a later version."""


class EventIndex:
    """Index of one `events.jsonl`. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self.summary = EventSummary()
        self._columns = Columns()
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._marks: list[tuple[int, int]] = []
        """Positions about `CHUNK_BYTES` apart: the last event id before each, and its byte offset."""

    def refresh(self) -> EventSummary:
        """Read appended lines and return a snapshot. A file that was replaced or truncated is read from the start."""
        with self._lock:
            self._read()
            return self.summary.copy()

    def series(self) -> str:
        """The curves as a JSON object: `last_id`, the columns `COLUMNS`, and held-out losses and drift by step."""
        with self._lock:
            self._read()
            columns = dict(self._columns.json())
            validations = list(self.summary.validations.values())
            last_id = self.summary.last_id
        for curve, name in (("held_out", "loss"), ("drift", "drift")):
            measured = {event.step: vars(event) for event in validations if vars(event)[name] is not None}
            rows = [measured[step] for step in sorted(measured)]
            values = {key: [row[key] for row in rows] for key in ("step", name, f"ema_{name}")}
            columns[curve] = json.dumps(values, allow_nan=False)
        body = ", ".join(f'"{name}": {values}' for name, values in columns.items())
        return f'{{"last_id": {last_id}, {body}}}'

    def position(self, after: int) -> tuple[int, bool]:
        """Return the byte offset of the first event with an id above `after`, and whether the file reaches `after`. If
        it does not, the file was replaced, and the offset is 0."""
        with self._lock:
            self._read()
            if after > self.summary.last_id:
                return 0, False
            if after == self.summary.last_id:
                return self._offset, True
            mark = max(0, bisect.bisect_right(self._marks, (after, math.inf)) - 1)
            offset = self._marks[mark][1]
            with self.path.open("rb") as file:
                while data := whole_lines(file, offset):
                    for line in data.splitlines(keepends=True):
                        if any(number > after for number, _ in events_in(line)):
                            return offset, True
                        offset += len(line)
            return offset, True

    def _read(self) -> None:
        try:
            file = self.path.open("rb")
        except OSError:
            self._clear()
            return
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._identity or status.st_size < self._offset:
                self._clear()
                self._identity = identity
            while data := whole_lines(file, self._offset):
                if not self._marks or self._offset >= self._marks[-1][1] + CHUNK_BYTES:
                    self._marks.append((self.summary.last_id, self._offset))
                self._take(data)
                self._offset += len(data)

    def _take(self, data: bytes) -> None:
        for is_other, group in itertools.groupby(split(data), key=lambda groups: not groups[_ID]):
            if not is_other:
                lines = list(group)
                self._columns.add([tuple(line[column] for column in _COLUMN_GROUPS) for line in lines])
                self.summary.last_id = int(lines[-1][_ID])
                continue
            for line in group:
                try:
                    self._take_other(line[_OTHER])
                except DamagedText:
                    self.summary.damaged += 1

    def _take_other(self, text: str) -> None:
        line = parsed(text)
        self.summary.last_id = line["id"]
        if line.get("type") == "step":
            self._columns.add([_row(line)])
        else:
            self.summary.take(line)


def _row(line: dict[str, Any]) -> Row:
    """Return the columns of a step whose line does not match `_LINE`.

    Raises:
        DamagedText: it has no step number.
    """
    if type(line.get("step")) is not int or line["step"] < 1:
        raise DamagedText
    values = (line.get(name) for name in COLUMNS)
    return tuple(json.dumps(value) if type(value) in (int, float) else "null" for value in values)


class EventIndexes:
    """Cache of event indexes: the `RUNS_KEPT` most recently used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._indexes: OrderedDict[Path, EventIndex] = OrderedDict()

    def of(self, path: Path) -> EventIndex:
        """Return the index of the events file at `path`, which need not exist yet."""
        with self._lock:
            index = self._indexes.pop(path, None) or EventIndex(path)
            self._indexes[path] = index
            while len(self._indexes) > RUNS_KEPT:
                self._indexes.popitem(last=False)
            return index
