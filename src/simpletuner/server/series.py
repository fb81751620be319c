"""What a run's events say, kept beside the file: the curves as columns, and what is not a step as it came.

A file that grows is read on from where the last look ended, so each byte is parsed once. The curves stay text: a number
goes from the event's line into the answer as it stands there, neither rounded nor read and written again, which is what
makes 100,000 steps quick.
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
"""Keys of a `step` event that become curves."""
CHUNK_BYTES = 256 * 1024
"""How much of the file is taken at once: parsing it holds the interpreter for about a millisecond."""
BLOCK_STEPS = 1024
"""Steps whose text lies together; what a later attempt overwrites is redone by the block."""
NOTICES_KEPT = 200
RUNS_KEPT = 8

Row = tuple[str, ...]
"""The columns of one step, as JSON."""

_COUNT = r"[1-9][0-9]{0,17}"
_INTEGER = f"(?:0|{_COUNT})"
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"


def _line_pattern() -> re.Pattern[str]:
    """Matches a whole line: one of a step as `EventLog` writes it, into its columns and id, or any other, as it is."""
    head = [f'"v": {SCHEMA_VERSION}', f'"id": (?P<id>{_INTEGER})', r'"time": "[0-9T:.+-]*"', f'"attempt": {_INTEGER}']
    pattern = r"\{" + ", ".join(head) + f'(?:, "start": {_INTEGER})?'  # which files of older releases lack
    for name, described in StepEvent.model_fields.items():
        if name == "type":
            pattern += ', "type": "step"'
            continue
        number = _COUNT if name == "step" else _INTEGER if described.annotation is int else _NUMBER
        if name in COLUMNS:
            pattern += f', "{name}": (?P<{name}>{number})'
        elif described.is_required():
            pattern += f', "{name}": {number}'
        else:  # files of older releases lack it
            pattern += f'(?:, "{name}": (?:{number}|null))?'
    return re.compile(pattern + r"\}\n|(?P<other>[^\n]*)\n")


_LINE = _line_pattern()
_ID = _LINE.groupindex["id"] - 1
_OTHER = _LINE.groupindex["other"] - 1
_AT = tuple(_LINE.groupindex[name] - 1 for name in COLUMNS)


class Damaged(Exception):
    """A text that is no JSON, or a line that is no event."""


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


# NaN and infinity are no JSON, though Python writes them; a page gets null instead.
_DECODER = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite)


def decoded(text: str) -> Any:
    """The JSON value in `text`, such that it can be an answer: with null for what is no finite number.

    Raises:
        Damaged: it holds none.
    """
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:  # half of a surrogate pair can be read and not be written
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Damaged from None
    return value


def parsed(line: str) -> dict[str, Any]:
    """The event in `line`, with null for what is no finite number.

    Raises:
        Damaged: it holds none.
    """
    event = decoded(line)
    if not isinstance(event, dict):
        raise Damaged
    if type(event.get("id")) is not int or type(event.get("attempt")) is not int:
        raise Damaged
    return event


def whole_lines(file: BinaryIO, offset: int) -> bytes:
    """The lines from `offset` on, about `CHUNK_BYTES` of them, the last one ended. Empty where no line ends yet."""
    size = CHUNK_BYTES
    while True:
        file.seek(offset)
        data = file.read(size)
        end = data.rfind(b"\n") + 1
        if end or len(data) < size:
            return data[:end]
        size *= 2


def split(data: bytes) -> Iterator[Sequence[str]]:
    """The groups of `_LINE` of each line."""
    # A torn character is replaced, so that one damaged line costs no other.
    yield from _LINE.findall(data.decode(errors="replace"))


def numbered(data: bytes) -> Iterator[tuple[int, str]]:
    """Id and JSON text of each event in `data`, without what is damaged; a text has no line break in it."""
    lines = data.decode(errors="replace")
    for match in _LINE.finditer(lines):
        if match["id"]:
            yield int(match["id"]), match[0][:-1]
            continue
        text = match["other"].strip()
        try:
            event = parsed(text)
        except Damaged:
            continue
        if "NaN" in text or "Infinity" in text or "\r" in text:
            text = json.dumps(event, ensure_ascii=False)
        yield event["id"], text


@dataclass
class _Block:
    """Steps that lie together: each column is their values with commas between, the first is the steps."""

    last: int = 0
    columns: list[str] = field(default_factory=lambda: [""] * len(COLUMNS))

    def add(self, steps: list[int], rows: list[Row]) -> None:
        if steps[0] <= self.last or any(after <= before for before, after in itertools.pairwise(steps)):
            before = zip(*(column.split(",") for column in self.columns), strict=True) if self.last else ()
            merged = {int(row[0]): row for row in itertools.chain(before, rows)}
            steps = sorted(merged)
            rows = [merged[step] for step in steps]
            self.columns = [""] * len(COLUMNS)
        self.last = steps[-1]
        added = map(",".join, zip(*rows, strict=True))
        self.columns = [f"{old},{new}" if old else new for old, new in zip(self.columns, added, strict=True)]


class Columns:
    """The curves of a run. Of each step the row that was added last counts."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows, in the order of the file."""
        numbers = [int(row[0]) for row in rows]
        at = 0
        for block, group in itertools.groupby(numbers, key=lambda step: step // BLOCK_STEPS):
            steps = list(group)
            self._blocks.setdefault(block, _Block()).add(steps, list(rows[at : at + len(steps)]))
            at += len(steps)

    def json(self) -> Iterator[tuple[str, str]]:
        """Each column's name and its JSON array."""
        blocks = [self._blocks[key] for key in sorted(self._blocks)]
        for index, name in enumerate(COLUMNS):
            yield name, f"[{','.join(block.columns[index] for block in blocks)}]"


@dataclass
class PhaseState:
    """How far a phase of the last start is."""

    phase: str
    state: Literal["begin", "end"] = "begin"
    seconds: float | None = None
    memory_gib: float | None = None
    progress: ProgressEvent | None = None


@dataclass
class Told:
    """What the events say beside the steps."""

    last_id: int = 0
    attempts: int = 0
    """Starts that were not refused."""
    starts: int = 0
    plan: PlanEvent | None = None
    phases: dict[str, PhaseState] = field(default_factory=dict)
    """Those of the last start, in the order they began."""
    validations: dict[tuple[int, bool], ValidationEvent] = field(default_factory=dict)
    """By step, and whether it holds a loss: the last attempt's count."""
    checkpoints: list[CheckpointEvent] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    """Those of the last start."""
    damaged: int = 0
    """Lines that are no events."""

    def copy(self) -> Self:
        """What is told now, untouched by what comes."""
        return replace(
            self,
            phases={name: replace(phase) for name, phase in self.phases.items()},
            validations=dict(self.validations),
            checkpoints=list(self.checkpoints),
        )

    def take(self, line: dict[str, Any]) -> None:
        """Note one event that is no step.

        Raises:
            Damaged: a key of it is missing or wrong.
        """
        if start_of(line) > self.starts:
            self.starts, self.attempts = start_of(line), line["attempt"]
            self.phases, self.notices = {}, []
        if line.get("type") == "end" and line.get("reason") == "error" and "start" in line:
            self.attempts = line["attempt"] - ("train" not in self.phases)
        kind = _KINDS.get(str(line.get("type")))
        if kind is None:  # told by the run's status, or of a later version of the program
            return
        try:
            event = kind.model_validate(line, extra="ignore")
        except ValidationError:
            raise Damaged from None
        self._note(event)

    def _note(self, event: Event) -> None:
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


_KINDS: dict[str, type[Event]] = {
    "plan": PlanEvent,
    "phase": PhaseEvent,
    "progress": ProgressEvent,
    "validation": ValidationEvent,
    "checkpoint": CheckpointEvent,
    "notice": NoticeEvent,
}


class Index:
    """What one `events.jsonl` says so far. May be asked from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self.told = Told()
        self._columns = Columns()
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._marks: list[tuple[int, int]] = []
        """Places about `CHUNK_BYTES` apart, each with the last id before it."""

    def look(self) -> Told:
        """Read what was appended. A file that shrank below what was read, or is another one, is read anew."""
        with self._lock:
            self._read()
            return self.told.copy()

    def series(self) -> str:
        """The curves as a JSON object: `last_id`, the columns of `COLUMNS`, held-out losses and drift by step."""
        with self._lock:
            self._read()
            columns = dict(self._columns.json())
            validations = list(self.told.validations.values())
            last_id = self.told.last_id
        measured = {event.step: event for event in validations if event.loss is not None}
        steps = sorted(measured)
        held_out = {
            "step": steps,
            "loss": [measured[step].loss for step in steps],
            "ema_loss": [measured[step].ema_loss for step in steps],
        }
        moved = {event.step: event for event in validations if event.drift is not None}
        drift = {
            "step": sorted(moved),
            "drift": [moved[step].drift for step in sorted(moved)],
            "ema_drift": [moved[step].ema_drift for step in sorted(moved)],
        }
        columns |= {"held_out": json.dumps(held_out, allow_nan=False), "drift": json.dumps(drift, allow_nan=False)}
        body = ", ".join(f'"{name}": {values}' for name, values in columns.items())
        return f'{{"last_id": {last_id}, {body}}}'

    def place(self, after: int) -> tuple[int, bool]:
        """Where the first event with an id above `after` lies, in bytes, and whether the file knows `after` at all.
        Where it does not, it was replaced, and the place is its start."""
        with self._lock:
            self._read()
            if after > self.told.last_id:
                return 0, False
            if after == self.told.last_id:
                return self._offset, True
            at = max(0, bisect.bisect_right(self._marks, (after, math.inf)) - 1)
            offset = self._marks[at][1]
            with self.path.open("rb") as file:
                while data := whole_lines(file, offset):
                    for line in data.splitlines(keepends=True):
                        if any(number > after for number, _ in numbered(line)):
                            return offset, True
                        offset += len(line)
            return offset, True

    def _read(self) -> None:
        try:
            file = self.path.open("rb")
        except OSError:
            self._forget()
            return
        with file:
            found = os.fstat(file.fileno())
            identity = (found.st_dev, found.st_ino)
            if identity != self._identity or found.st_size < self._offset:
                self._forget()
                self._identity = identity
            while data := whole_lines(file, self._offset):
                if not self._marks or self._offset >= self._marks[-1][1] + CHUNK_BYTES:
                    self._marks.append((self.told.last_id, self._offset))
                self._take(data)
                self._offset += len(data)

    def _take(self, data: bytes) -> None:
        for is_other, group in itertools.groupby(split(data), key=lambda found: not found[_ID]):
            if not is_other:
                found = list(group)
                self._columns.add([tuple(one[at] for at in _AT) for one in found])
                self.told.last_id = int(found[-1][_ID])
                continue
            for one in group:
                try:
                    self._take_other(one[_OTHER])
                except Damaged:
                    self.told.damaged += 1

    def _take_other(self, text: str) -> None:
        line = parsed(text)
        self.told.last_id = line["id"]
        if line.get("type") == "step":
            self._columns.add([_row(line)])
        else:
            self.told.take(line)


def _row(line: dict[str, Any]) -> Row:
    """The columns of a step that is not spelled as we spell it.

    Raises:
        Damaged: it does not say which step.
    """
    if type(line.get("step")) is not int or line["step"] < 1:
        raise Damaged
    values = (line.get(name) for name in COLUMNS)
    return tuple(json.dumps(value) if type(value) in (int, float) else "null" for value in values)


class Indexes:
    """The indexes of the runs that were asked for last, `RUNS_KEPT` of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Path, Index] = OrderedDict()

    def of(self, path: Path) -> Index:
        """The index of the events at `path`, which need not be there yet."""
        with self._lock:
            index = self._kept.pop(path, None) or Index(path)
            self._kept[path] = index
            while len(self._kept) > RUNS_KEPT:
                self._kept.popitem(last=False)
            return index
