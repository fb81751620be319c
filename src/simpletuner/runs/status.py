"""Where a run stands, read from its lock and the two ends of its events: quick, however long they are."""

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
    """A run at a glance. What is not known (yet) is None."""

    root: Path
    """The run directory."""
    state: RunState
    """new: nothing has happened yet. starting: its process is being loaded, checks the configuration and has written
    nothing yet. running: a process holds it. killed: the last attempt just broke off."""
    pid: int | None
    """Process that holds it, while it is starting or running."""
    phase: Phase | None
    """The phase that is going on, or that the last attempt broke off in."""
    progress: tuple[int, int] | None
    """Items done and in all, of a phase other than training."""
    step: int
    """Steps that are finished."""
    steps: int | None
    """Steps in all."""
    loss: float | None
    """Of the last step alone."""
    seconds_per_step: float | None
    """Wall time of the last step."""
    held_out: tuple[float, float] | None
    """The first and the last held-out loss."""
    saved: int | None
    """Step of the newest checkpoint on the disk."""
    attempt: int
    """1 at the first start, one more after each restart; 0 before it. A start that was refused is none."""
    starts: int
    """Every start so far that wrote events."""
    is_refused: bool
    """Whether the last start ended with an error before it trained."""
    started: str | None
    """Time of the first event, or of the start that was asked for; UTC, ISO 8601, as in the events."""
    updated: str | None
    """Time of the last event."""
    ended: str | None
    """When the last start ended; None while it is running, and where it was killed."""
    error: str | None
    """What the last start ended with: found, expected, remedy."""
    exit_code: int | None
    """Of the last start, once it has ended."""
    lora: Path | None
    """The finished LoRA, if the run is done."""
    model: Path | None
    """The finished model of a full run, if the run is done."""
    last_id: int
    """Of the last event; 0 before the first."""
    note: str
    """The user's own words about it."""


def status_of(run: RunDirectory) -> RunStatus:
    """Where `run` stands now. Takes milliseconds also where its events are many megabytes.

    A run directory that is missing or empty is "new". Damaged lines are passed over.
    """
    # Before the events: a run that ends in between is then still running, and not killed.
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
                tail.run = next(_backwards(file, "run", tail.looked_to), None)
            if tail.step is None:
                tail.step = next(_backwards(file, "step", tail.looked_to), None)
            tail.held_out = _held_out(file)
            tail.is_refused = was_refused(file)
    if tail.last is not None and tail.end is None and not is_held:
        # It may have been taken up meanwhile, which is not what broke off.
        is_held = run.lock().is_held()
        pid = run.lock().pid() if is_held else None
    return _with_start(_assembled(run, tail, is_held=is_held, pid=pid), start, starting_pid)


def _with_start(status: RunStatus, start: StartRecord | None, starting_pid: int | None) -> RunStatus:
    """The status, with a start that has written no event: one that goes on, was stopped, or was refused."""
    if start is None or status.state == "running" or status.starts != start.starts:
        return status
    began = status.started or start.time
    if starting_pid is not None:
        return replace(status, state="starting", pid=starting_pid, phase=None, progress=None, started=began, error=None)
    if start.is_stopped:
        return replace(status, state="stopped" if status.state == "new" else status.state, started=began)
    # What an earlier attempt came to stays true.
    state: RunState = "failed" if status.state == "new" else status.state
    return replace(status, state=state, started=began, error=start_refusal(RunDirectory(status.root), start))


def find_runs(folder: Path, depth: int = 3) -> list[RunDirectory]:
    """The run directories below `folder`, itself included, at most `depth` folders down; in the order of their paths.

    A run is a folder with events.jsonl, or with the record of a start. Runs are not looked for inside runs, nor behind
    links, nor in folders that this user may not enter.
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
    """Whether something was trained in this folder, or was to be."""
    root = str(run.root)
    return os.path.isfile(f"{root}/{EVENTS_NAME}") or os.path.isfile(f"{root}/{STARTING_NAME}")


@dataclass
class _Tail:
    """What the last lines told."""

    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    """That of the last start."""
    is_refused: bool = False
    error: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    step: dict[str, Any] | None = None
    done: int | None = None
    """Steps finished, by whichever event told last."""
    phase: Phase | None = None
    progress: tuple[int, int] | None = None
    held_out: tuple[float, float] | None = None
    looked_to: int = 0
    """Byte of the file that all events after were looked at."""


def _read_tail(file: BinaryIO) -> _Tail:
    """The last events, back to where the current phase is known; never more than a few blocks."""
    tail = _Tail()
    ended: list[str] = []
    knows_phase = False
    for start, event in _events_backward(file):
        if tail.last is None:
            tail.last = event
        tail.looked_to = start
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
            knows_phase = _look_for_phase(event, tail, ended)
        if knows_phase and tail.done is not None:
            break
    return tail


def _finished(event: dict[str, Any]) -> int | None:
    """Steps that are finished, if `event` tells."""
    if event["type"] == "step":
        return int(event["step"])
    if event["type"] == "run":
        return int(event["resumed_from"] or 0)
    # An attempt that was refused ends with step 0, whatever lies on the disk.
    return int(event["step"]) or None if event["type"] == "end" else None


def _look_for_phase(event: dict[str, Any], tail: _Tail, ended: list[str]) -> bool:
    """Going backwards, whether `event` tells which phase the last one belongs to."""
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
        state = "done"  # what was finished stays
    elif end is not None:
        state = _REASONS[end["reason"]]
    elif tail.last is not None and run.finished.is_file():
        state = "done"  # a start of a finished run was killed while it looked
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
    """The result at `path`, if the run's end names it, or it is there where that is not told."""
    has_it = path.exists() if end is None else end.get(name) is not None
    return path if has_it else None


def _held_out(file: BinaryIO) -> tuple[float, float] | None:
    last = next((e["loss"] for e in _backwards(file, "validation") if e.get("loss") is not None), None)
    if last is None:
        return None
    first = next(e["loss"] for e in _events_forward(file, b'"type": "validation"') if e.get("loss") is not None)
    return first, last


def _event(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None for one that is torn or damaged, or lacks a field."""
    event = parse_event(line)
    if event is None:
        return None
    known = EVENTS.get(event["type"])
    # What has no default is in every line that we wrote; a line without it is not ours.
    is_whole = known is None or all(name in event for name, own in known.model_fields.items() if own.is_required())
    return event if is_whole else None


def _events_backward(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for start, line in lines_backward(file):
        event = _event(line)
        if event is not None:
            yield start, event


def _backwards(file: BinaryIO, kind: str, end: int | None = None) -> Iterator[dict[str, Any]]:
    """Events of one type before byte `end`, by default all, the last one first. Only those are parsed."""
    mark = f'"type": "{kind}"'.encode()
    for _, line in lines_backward(file, end, mark):
        if mark in line:
            event = _event(line)
            if event is not None and event["type"] == kind:
                yield event


def _events_forward(file: BinaryIO, mark: bytes = b"") -> Iterator[dict[str, Any]]:
    """Events whose line holds `mark`, the first one first."""
    file.seek(0)
    for line in file:
        if mark in line:
            event = _event(line)
            if event is not None:
                yield event
