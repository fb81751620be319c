"""Where a run stands and what it does, in words and as JSON."""

import datetime
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from simpletuner.base.sizes import format_duration
from simpletuner.runs.events import TITLES, read_appended
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.status import RunStatus

POLL_EVENTS_EVERY_S = 0.25
LINE_EVERY_S = 10.0
"""Progress of a phase other than training comes at most this often."""
_JSON_KEYS = {"root": "run", "is_refused": "refused"}
"""Fields of a status that have another name in JSON."""


def as_json(status: RunStatus) -> dict[str, Any]:
    """A status for a JSON reader. Paths are from the working folder, times UTC in ISO 8601."""
    progress, held_out = status.progress, status.held_out
    others = {
        "progress": None if progress is None else {"done": progress[0], "total": progress[1]},
        "held_out": None if held_out is None else {"first": held_out[0], "last": held_out[1]},
    }
    return {
        _JSON_KEYS.get(name, name): str(value) if isinstance(value, Path) else value
        for name, value in (vars(status) | others).items()
    }


def described(status: RunStatus) -> str:
    """A status in a few lines."""
    holder = f", process {status.pid}" if status.pid else ""
    again = f", attempt {status.attempt}" if status.attempt > 1 else ""
    lines = [f"{status.root}: {status.state}{holder}{again}"]
    if status.steps is not None:
        share = f" ({status.step / status.steps:.0%})" if status.steps else ""
        loss = "" if status.loss is None else f", loss {status.loss:.4f} in that step"
        lines.append(f"  step {status.step} of {status.steps}{share}{loss}{_pace(status)}")
    if status.phase not in (None, "train"):
        done = "" if status.progress is None else f", {status.progress[0]} of {status.progress[1]}"
        lines.append(f"  {TITLES[status.phase]}{done}")
    if status.held_out is not None:
        lines.append(f"  held-out loss {status.held_out[0]:.4f} at first, {status.held_out[1]:.4f} at last")
    if status.started is not None and status.updated is not None:
        lines.append(f"  began {shown_time(status.started)}, last heard of {shown_time(status.updated)}")
    if status.is_refused and status.attempt:
        lines.append("  its last start was refused, and what was trained is as it was:")
    lines += [f"  {line}" for line in (status.error or "").splitlines()]
    lines += [f"  note: {line}" for line in status.note.splitlines()]
    if status.state == "killed":
        lines.append("  it broke off without an end: the same command goes on from its last checkpoint")
    if status.state == "stopped":
        lines.append(f"  {_left_at(status)}")
    lines += [f"  {result}" for result in (status.lora, status.model) if result is not None]
    return "\n".join(lines)


def _left_at(status: RunStatus) -> str:
    """Where the same command goes on after a stop."""
    if status.saved is None:
        return "nothing was saved: the same command begins anew"
    if status.saved < status.step:
        return f"step {status.step} was not saved: the same command goes on from step {status.saved}"
    return f"saved at step {status.saved}: the same command goes on from there"


def _pace(status: RunStatus) -> str:
    if status.seconds_per_step is None:
        return ""
    pace = f", {status.seconds_per_step:.2f} s/step"
    if status.state != "running" or status.steps is None:
        return pace
    return f"{pace}, {format_duration((status.steps - status.step) * status.seconds_per_step)} left"


def shown_time(time_text: str) -> str:
    """A time of the events in this machine's zone: "2026-11-25 00:20:19"."""
    return datetime.datetime.fromisoformat(time_text).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def followed(run: RunDirectory, place: int) -> Iterator[dict[str, Any]]:
    """The events after byte `place`, as they come, until no process holds the run any more."""
    while True:
        # Before the events: the last ones must not be missed.
        is_held = run.lock().is_held() or run.starting_lock().is_held()
        events, place = read_appended(run.events, place)
        yield from events
        if not is_held:
            return
        if not events:
            time.sleep(POLL_EVENTS_EVERY_S)


class Narrator:
    """Turns events into lines for people."""

    def __init__(self, steps: int | None) -> None:
        self._of = "" if steps is None else f" of {steps}"
        self._said = float("-inf")

    def lines(self, event: dict[str, Any]) -> Sequence[str]:
        """What to print of an event; nothing of most."""
        kind = event["type"]
        if kind == "run":
            self._of = f" of {event['steps']}"
            return ()
        if kind == "step":
            pace = f"loss {event['loss']:.4f}, lr {event['lr']:.2e}, {event['seconds']:.2f} s"
            return (f"step {event['step']}{self._of}: {pace}",)
        if kind == "phase" and event["state"] == "begin":
            return (TITLES[event["phase"]],)
        if kind == "progress" and (event["done"] == event["total"] or time.monotonic() - self._said > LINE_EVERY_S):
            self._said = time.monotonic()
            return (f"  {event['done']} of {event['total']}",)
        if kind == "validation":
            return tuple(self._validation(event))
        if kind == "checkpoint":
            reason = f": {event['reason']}" if event["reason"] else ""
            return (f"checkpoint {event['path']} {event['state']}{reason}",)
        if kind == "notice":
            return (f"Note: {event['text']}",)
        if kind == "error":
            return (event["text"],)
        return (f"{event['reason']} at step {event['step']}",) if kind == "end" else ()

    @staticmethod
    def _validation(event: dict[str, Any]) -> Iterator[str]:
        if event["loss"] is not None:
            yield f"held-out loss at step {event['step']}: {event['loss']:.4f}"
        if event["sheet"]:
            yield f"pictures at step {event['step']}: {event['sheet']}"
