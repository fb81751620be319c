"""The status of a run, read from its lock and from both ends of its events: fast for files of any length."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from simpletuner.runs.checkpoints import steps
from simpletuner.runs.events import EVENTS, Phase, lines_backward, parse_event, start_of, was_refused
from simpletuner.runs.layout import EVENTS_NAME, STARTING_NAME, RunDirectory
from simpletuner.runs.note import read_note
from simpletuner.runs.starting import StartRecord, start_record, start_refusal

RunState = Literal["new", "starting", "running", "done", "stopped", "failed", "killed"]

_REASONS: dict[str, RunState] = {"done": "done", "stopped": "stopped", "error": "failed"}


@dataclass(frozen=True)
class RunStatus:
    """The status of a run. Fields without a value (yet) are None."""

    root: Path
    """The run directory."""
    state: RunState
    """new: never started. starting: its process loads, checks the configuration and has written no event yet. running:
    a process holds it. killed: the last attempt ended without an end event."""
    pid: int | None
    """Id of its process while it is starting or running."""
    phase: Phase | None
    """The current phase, or the phase in which the last attempt ended."""
    progress: tuple[int, int] | None
    """Number of finished items and of all items, in a phase other than training."""
    step: int
    """Number of finished steps."""
    steps: int | None
    """Total steps of the run."""
    loss: float | None
    """Loss of the last step only."""
    seconds_per_step: float | None
    """Wall time of the last step."""
    held_out: tuple[float, float] | None
    """The first and the last held-out loss."""
    saved: int | None
    """Step of the newest checkpoint on the disk."""
    attempt: int
    """0 before the first start, 1 after it, one more after each restart. A refused start does not count."""
    starts: int
    """Number of starts that wrote events."""
    is_refused: bool
    """Whether the last start ended with an error before it trained."""
    started: str | None
    """Time of the first event, or of the requested start; UTC, ISO 8601, as in the events."""
    updated: str | None
    """Time of the last event."""
    ended: str | None
    """Time at which the last start ended; None while it runs, and if it was killed."""
    error: str | None
    """The error of the last start: finding, expectation and remedy."""
    exit_code: int | None
    """Exit code of the last start, once it has ended."""
    lora: Path | None
    """The finished LoRA, if the run is done."""
    model: Path | None
    """The finished model of a full run, if the run is done."""
    last_id: int
    """Id of the last event; 0 before the first."""
    note: str
    """The user's note about the run."""


def status_of(run: RunDirectory) -> RunStatus:
    """Read the current status of `run`. Takes milliseconds even if its events take many megabytes.

    A run directory that is missing or empty is "new". Damaged lines are skipped.
    """
    # Check the locks before reading events: a run that ends in between then counts as running, not as killed.
    start = start_record(run)
    starting_pid = run.starting_lock().pid() if start is not None and run.starting_lock().is_held() else None
    is_held = run.lock().is_held()
    pid = run.lock().pid() if is_held else None
    try:
        file = run.events.open("rb")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return _with_start(_assembled(run, _Tail(), is_held=is_held, pid=pid), start, starting_pid)
    with file:
        tail = _read_tail(file)
        if tail.last is not None:
            tail.first = next(_events_forward(file), None)
            if tail.run is None:
                tail.run = next(_backwards(file, "run", tail.read_from), None)
            if tail.step is None:
                tail.step = next(_backwards(file, "step", tail.read_from), None)
            tail.held_out = _held_out(file)
            tail.is_refused = was_refused(file)
    if tail.last is not None and tail.end is None and not is_held:
        # The run may have been resumed meanwhile, in which case it was not killed.
        is_held = run.lock().is_held()
        pid = run.lock().pid() if is_held else None
    return _with_start(_assembled(run, tail, is_held=is_held, pid=pid), start, starting_pid)


def _with_start(status: RunStatus, start: StartRecord | None, starting_pid: int | None) -> RunStatus:
    """The status, updated for a start that has written no event: it is starting, was stopped, or was refused."""
    if start is None or status.state == "running" or status.starts != start.starts:
        return status
    began = status.started or start.time
    if starting_pid is not None:
        return replace(status, state="starting", pid=starting_pid, phase=None, progress=None, started=began, error=None)
    if start.is_stopped:
        return replace(status, state="stopped" if status.state == "new" else status.state, started=began)
    # The result of an earlier attempt is kept.
    state: RunState = "failed" if status.state == "new" else status.state
    return replace(status, state=state, started=began, error=start_refusal(RunDirectory(status.root), start))


def find_runs(folder: Path, depth: int = 3) -> list[RunDirectory]:
    """The run directories in `folder`, itself included, at most `depth` levels below, sorted by path.

    A run is a folder with events.jsonl, or with the record of a start. Runs inside runs, behind links, or in folders
    without permission are not found.
    """
    if is_run(RunDirectory(folder)):
        return [RunDirectory(folder)]
    if depth == 0 or not os.path.isdir(folder):
        return []
    try:
        below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except PermissionError:
        return []
    return [run for path in below for run in find_runs(Path(path), depth - 1)]


def is_run(run: RunDirectory) -> bool:
    """Whether a run was started in this folder."""
    root = str(run.root)
    return os.path.isfile(f"{root}/{EVENTS_NAME}") or os.path.isfile(f"{root}/{STARTING_NAME}")


@dataclass
class _Tail:
    """The status as far as the last lines of the events contain it."""

    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    """The `end` event of the last start."""
    is_refused: bool = False
    error: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    step: dict[str, Any] | None = None
    done: int | None = None
    """Number of finished steps, from the last event with that number."""
    phase: Phase | None = None
    progress: tuple[int, int] | None = None
    held_out: tuple[float, float] | None = None
    read_from: int = 0
    """Byte of the file after which all events were read."""


def _read_tail(file: BinaryIO) -> _Tail:
    """Read the last events, backward until the current phase is known; at most a few blocks."""
    tail = _Tail()
    ended: list[str] = []
    knows_phase = False
    for start, event in _events_backward(file):
        if tail.last is None:
            tail.last = event
        tail.read_from = start
        kind, is_current = event["type"], start_of(event) == start_of(tail.last)
        if not is_current:
            knows_phase = True
        if kind == "end" and is_current:
            tail.end = tail.end or event
        elif kind == "error" and is_current:
            tail.error = tail.error or event
        elif kind == "run":
            tail.run = tail.run or event
        elif kind == "step":
            tail.step = tail.step or event
        if tail.done is None:
            tail.done = _finished(event)
        if not knows_phase:
            knows_phase = _find_phase(event, tail, ended)
        if knows_phase and tail.done is not None:
            break
    return tail


def _finished(event: dict[str, Any]) -> int | None:
    """Number of finished steps according to `event`, if it has one."""
    if event["type"] == "step":
        return int(event["step"])
    if event["type"] == "run":
        return int(event["resumed_from"] or 0)
    # A refused attempt ends with step 0, regardless of the checkpoints on the disk.
    return int(event["step"]) or None if event["type"] == "end" else None


def _find_phase(event: dict[str, Any], tail: _Tail, ended: list[str]) -> bool:
    """Reading backward, whether `event` determines the phase of the last event."""
    kind = event["type"]
    if kind == "step":
        tail.phase = "train"
        return True
    if kind == "phase" and event["state"] == "end":
        ended.append(event["phase"])
    elif kind == "phase" and event["phase"] in ended:
        ended.remove(event["phase"])
    elif kind == "phase":
        tail.phase = event["phase"]
        return True
    elif kind == "progress" and event["phase"] not in ended:
        tail.phase, tail.progress = event["phase"], (event["done"], event["total"])
        return True
    return False


def _assembled(run: RunDirectory, tail: _Tail, *, is_held: bool, pid: int | None) -> RunStatus:
    end = None if is_held else tail.end
    state: RunState = "new" if tail.last is None else "killed"
    if is_held:
        state = "running"
    elif tail.is_refused and run.finished.is_file():
        state = "done"  # a finished run stays finished
    elif end is not None:
        state = _REASONS[end["reason"]]
    elif tail.last is not None and run.finished.is_file():
        state = "done"  # a later start of a finished run was killed while it checked the results
    error = None if is_held or tail.error is None else tail.error["text"]
    is_done = state == "done"
    is_refused = tail.is_refused and not is_held
    return RunStatus(
        root=run.root,
        state=state,
        pid=pid,
        phase=None if is_done else tail.phase,
        progress=None if is_done else tail.progress,
        step=tail.done or 0,
        steps=None if tail.run is None else tail.run["steps"],
        loss=None if tail.step is None else tail.step["loss"],
        seconds_per_step=None if tail.step is None else tail.step["seconds"],
        held_out=tail.held_out,
        saved=max(steps(run), default=None),
        attempt=0 if tail.last is None else tail.last["attempt"] - is_refused,
        starts=0 if tail.last is None else start_of(tail.last),
        is_refused=is_refused,
        started=None if tail.first is None else tail.first["time"],
        updated=None if tail.last is None else tail.last["time"],
        ended=None if end is None else end["time"],
        error=error,
        exit_code=None if end is None else end["exit_code"],
        lora=_result(run.lora, None if is_refused else end, "lora") if is_done else None,
        model=_result(run.model, None if is_refused else end, "model") if is_done else None,
        last_id=0 if tail.last is None else tail.last["id"],
        note=read_note(run),
    )


def _result(path: Path, end: dict[str, Any] | None, name: str) -> Path | None:
    """The result at `path`, if the run's end event names it; without such an event, if the file exists."""
    has_it = path.exists() if end is None else end.get(name) is not None
    return path if has_it else None


def _held_out(file: BinaryIO) -> tuple[float, float] | None:
    last = next((e["loss"] for e in _backwards(file, "validation") if e.get("loss") is not None), None)
    if last is None:
        return None
    first = next(e["loss"] for e in _events_forward(file, b'"type": "validation"') if e.get("loss") is not None)
    return first, last


def _event(line: bytes) -> dict[str, Any] | None:
    """Parse the event in a line. None if the line is incomplete or damaged, or lacks a field."""
    event = parse_event(line)
    if event is None:
        return None
    event_class = EVENTS.get(event["type"])
    # Every line that we wrote has the fields without a default; a line without them is not ours.
    is_whole = event_class is None or all(
        name in event for name, field in event_class.model_fields.items() if field.is_required()
    )
    return event if is_whole else None


def _events_backward(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for start, line in lines_backward(file):
        event = _event(line)
        if event is not None:
            yield start, event


def _backwards(file: BinaryIO, kind: str, end: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the events of one type before byte `end` (by default all), the last one first. Only these are parsed."""
    mark = f'"type": "{kind}"'.encode()
    for _, line in lines_backward(file, end, mark):
        if mark in line:
            event = _event(line)
            if event is not None and event["type"] == kind:
                yield event


def _events_forward(file: BinaryIO, mark: bytes = b"") -> Iterator[dict[str, Any]]:
    """Yield the events whose line contains `mark`, the first one first."""
    file.seek(0)
    for line in file:
        if mark in line:
            event = _event(line)
            if event is not None:
                yield event
