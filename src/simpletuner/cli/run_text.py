"""A run's status and events, as text for people and as JSON."""

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
"""Minimum time between two progress lines of a phase other than training."""
_JSON_KEYS = {"root": "run", "is_refused": "refused"}
"""JSON keys of the `RunStatus` fields that have another name in JSON."""


def status_fields(status: RunStatus) -> dict[str, Any]:
    """`status` as a JSON object. Paths are relative to the working folder; times are UTC in ISO 8601."""
    progress, held_out = status.progress, status.held_out
    objects = {
        "progress": None if progress is None else {"done": progress[0], "total": progress[1]},
        "held_out": None if held_out is None else {"first": held_out[0], "last": held_out[1]},
    }
    return {
        _JSON_KEYS.get(name, name): str(value) if isinstance(value, Path) else value
        for name, value in (vars(status) | objects).items()
    }


def status_text(status: RunStatus) -> str:
    """`status` in a few lines of text."""
    process = f", process {status.pid}" if status.pid else ""
    attempt = f", attempt {status.attempt}" if status.attempt > 1 else ""
    lines = [f"{status.root}: {status.state}{process}{attempt}"]
    if status.steps is not None:
        share = f" ({status.step / status.steps:.0%})" if status.steps else ""
        loss = "" if status.loss is None else f", loss {status.loss:.4f} at that step"
        lines.append(f"  step {status.step} of {status.steps}{share}{loss}{_pace(status)}")
    if status.phase not in (None, "train"):
        done = "" if status.progress is None else f", {status.progress[0]} of {status.progress[1]}"
        lines.append(f"  {TITLES[status.phase]}{done}")
    if status.held_out is not None:
        lines.append(f"  held-out loss: first {status.held_out[0]:.4f}, last {status.held_out[1]:.4f}")
    if status.started is not None and status.updated is not None:
        lines.append(f"  started {local_time(status.started)}, last event {local_time(status.updated)}")
    if status.is_refused and status.attempt:
        lines.append("  the last start was refused; the run itself is unchanged:")
    lines += [f"  {line}" for line in (status.error or "").splitlines()]
    lines += [f"  note: {line}" for line in status.note.splitlines()]
    if status.state == "killed":
        lines.append("  the process ended unexpectedly: the same command resumes from the last checkpoint")
    if status.state == "stopped":
        lines.append(f"  {_resume_text(status)}")
    lines += [f"  {result}" for result in (status.lora, status.model) if result is not None]
    return "\n".join(lines)


def _resume_text(status: RunStatus) -> str:
    """From which step the same command resumes a stopped run."""
    if status.saved is None:
        return "no checkpoint was saved: the same command starts from the beginning"
    if status.saved < status.step:
        return f"step {status.step} was not saved: the same command resumes from step {status.saved}"
    return f"saved at step {status.saved}: the same command resumes from that step"


def _pace(status: RunStatus) -> str:
    if status.seconds_per_step is None:
        return ""
    pace = f", {status.seconds_per_step:.2f} s/step"
    if status.state != "running" or status.steps is None:
        return pace
    return f"{pace}, {format_duration((status.steps - status.step) * status.seconds_per_step)} left"


def local_time(time_text: str) -> str:
    """The time of an event in this machine's time zone: "2026-11-25 00:20:19"."""
    return datetime.datetime.fromisoformat(time_text).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def follow_events(run: RunDirectory, offset: int) -> Iterator[dict[str, Any]]:
    """Yield the events after byte `offset` as they are written, until no process holds the run's lock."""
    while True:
        # Check the lock before reading, so that the last events are not missed.
        is_held = run.lock().is_held() or run.starting_lock().is_held()
        events, offset = read_appended(run.events, offset)
        yield from events
        if not is_held:
            return
        if not events:
            time.sleep(POLL_EVENTS_EVERY_S)


class Narrator:
    """Turns a run's events into lines of text."""

    def __init__(self, steps: int | None) -> None:
        self._of_steps = "" if steps is None else f" of {steps}"
        self._progress_at = float("-inf")

    def lines(self, event: dict[str, Any]) -> Sequence[str]:
        """The lines to print for `event`; empty for most types of events."""
        kind = event["type"]
        if kind == "run":
            self._of_steps = f" of {event['steps']}"
            return ()
        if kind == "step":
            pace = f"loss {event['loss']:.4f}, lr {event['lr']:.2e}, {event['seconds']:.2f} s"
            return (f"step {event['step']}{self._of_steps}: {pace}",)
        if kind == "phase" and event["state"] == "begin":
            return (TITLES[event["phase"]],)
        if kind == "progress" and (
            event["done"] == event["total"] or time.monotonic() - self._progress_at > LINE_EVERY_S
        ):
            self._progress_at = time.monotonic()
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
            yield f"validation images at step {event['step']}: {event['sheet']}"
