"""What happens in a run, as typed JSON Lines: the one thing that pages, trackers and scripts read.

Each line also carries `v` (schema version), `id` (counts up without gaps, over restarts too), `time` (UTC, ISO 8601),
`attempt` (1 for the first start, one more after each restart, the same after a start that was refused) and `start`
(one more at each start). After a resume some steps come twice: readers keep the line of the last attempt.
"""

import datetime
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from pydantic import BaseModel, ConfigDict

from simpletuner.base.console import ESCAPED
from simpletuner.base.files import file_errors_reported

SCHEMA_VERSION = 1

BLOCK = 1 << 18
"""Bytes read at once, from the end of the file backwards."""

Phase = Literal["scan", "text", "latents", "load", "train", "validation", "export"]

TITLES: dict[Phase, str] = {
    "scan": "looking at the pictures",
    "text": "encoding captions",
    "latents": "encoding pictures",
    "load": "loading the transformer",
    "train": "training",
    "validation": "drawing",
    "export": "saving what was trained",
}
"""What each phase does, for people."""


class Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunEvent(Event):
    """The command started or resumed this run."""

    type: Literal["run"] = "run"
    program: str
    """Name and version of the program."""
    pid: int
    """Process that holds the run."""
    resumed_from: int | None
    """Step of the checkpoint the run goes on from; null at a fresh start."""
    steps: int
    """Optimizer steps the run will have in all."""
    pictures: int
    """Training pictures, not counting repeats."""
    trainable: int
    """Trained parameters."""
    processes: int = 1
    """Processes that train together."""
    engine: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "single"
    """single (one process), ddp (each holds the whole model), fsdp2 (each holds a shard of it), or a stage of ZeRO."""


class PlanEvent(Event):
    """What the run will take of the machine, before anything is loaded; a second one once the pictures are known."""

    type: Literal["plan"] = "plan"
    plan: dict[str, Any]
    """As `simpletuner plan --json` prints it; bytes. [plan.md](plan.md) says what each key means."""
    remedy: dict[str, Any] | None
    """The smallest change that would make it fit; null where it fits, or nothing helps."""


class PhaseEvent(Event):
    """A phase began or ended."""

    type: Literal["phase"] = "phase"
    phase: Phase
    """scan, text, latents, load, train, validation or export."""
    state: Literal["begin", "end"]
    """begin or end."""
    seconds: float | None = None
    """How long it took, at its end."""
    memory_gib: float | None = None
    """Peak memory of the phase, without phases inside it, in GiB, at its end: what the allocator reserved of the
    accelerator or, on a CPU, what was resident of the process."""
    memory_allocated_gib: float | None = None
    """What tensors took of it at their peak, in GiB; null on a CPU."""


class ProgressEvent(Event):
    """How far a phase other than training is."""

    type: Literal["progress"] = "progress"
    phase: Phase
    """The phase it belongs to."""
    done: int
    """Items finished."""
    total: int
    """Items in all."""
    per_s: float
    """Items a second since the phase began."""
    eta_s: float
    """Seconds left at that rate."""


class StepEvent(Event):
    """One optimizer step."""

    type: Literal["step"] = "step"
    step: int
    """Counts from 1."""
    epoch: int
    """The pass over the data that the step's first sample belongs to, from 0."""
    loss: float
    """Mean loss of the samples of this step alone. What the console shows is the average of the last 20 steps."""
    lr: float
    """Learning rate the step used."""
    grad_norm: float
    """Global gradient norm before clipping."""
    seconds: float
    """Wall time of the step."""
    preservation_loss: float | None = None
    """Mean over the samples of the weighted loss of `preservation`, which `loss` leaves out; null without that option.
    [preservation.md](preservation.md) explains it."""
    rollout_calls: int = 0
    """Model calls without gradient that scheduled sampling added to the step."""
    memory_gib: float
    """Peak memory of the training phase so far, in GiB: what the allocator reserved of the accelerator or, on a CPU,
    what was resident of the process."""
    memory_allocated_gib: float | None = None
    """What tensors took of it at their peak, in GiB; null on a CPU."""
    images_per_s: float | None = None
    """Images trained a second, over all processes. [performance.md](performance.md) explains this and what follows."""
    tflop_per_s: float | None = None
    """TFLOP/s of this process's device: products and attention of forward and backward, recompute not counted."""
    mfu: float | None = None
    """`tflop_per_s` over the device's data-sheet rate for dense bf16, 0 to 1; null where that is unknown."""
    hfu: float | None = None
    """The same with recompute counted."""


class Picture(Event):
    """One validation picture."""

    name: str
    """The prompt's name in the library."""
    prompt: str
    """The prompt as it was encoded."""
    references: tuple[str, ...] = ()
    """Its reference images: paths as the prompt library has them, from the working folder."""
    path: str
    """File, relative to the run directory."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    seed: int
    """Seed of the initial noise."""
    is_ema: bool = False
    """Drawn with the moving average in place of the live weights."""


class ValidationEvent(Event):
    """Pictures were made, or the held-out loss was measured."""

    type: Literal["validation"] = "validation"
    step: int
    """0 is the base model."""
    pictures: tuple[Picture, ...] = ()
    """What was drawn. A notice names each that could not be."""
    sheet: str | None = None
    """Contact sheet, relative to the run directory; null where it could not be made, or only the loss was measured."""
    loss: float | None = None
    """Held-out loss at fixed sigmas and noise, mean over the pictures."""
    loss_by_sigma: dict[str, float] = {}
    """The same, at each sigma."""
    ema_loss: float | None = None
    """Held-out loss of the moving average."""
    drift: float | None = None
    """How far the images of `validation_drift_prompts` are from the base model's, mean over the prompts: RMS difference
    of the final latents over the RMS of the base model's. 0 is unmoved, about 1 an image of other noise."""
    drift_by_prompt: dict[str, float] = {}
    """The same of each prompt; with `ema_validation` ema_only that of the moving average."""
    ema_drift: float | None = None
    """Mean drift of the moving average."""


class CheckpointEvent(Event):
    """A checkpoint was written, pruned, or found damaged."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    """Step it holds."""
    state: Literal["saved", "pruned", "damaged", "resumed"]
    """saved, pruned, damaged or resumed."""
    path: str
    """Folder, relative to the run directory."""
    bytes: int = 0
    """Size on disk, when saved."""
    reason: str | None = None
    """What is wrong with a damaged one."""


class NoticeEvent(Event):
    """Something the user should know and need not act on."""

    type: Literal["notice"] = "notice"
    text: str
    """One line."""


class ErrorEvent(Event):
    """The run is about to end with an error."""

    type: Literal["error"] = "error"
    exit_code: int
    """As the process will exit."""
    text: str
    """What was found, what was expected, what to do."""


class EndEvent(Event):
    """The last event of an attempt."""

    type: Literal["end"] = "end"
    reason: Literal["done", "stopped", "error"]
    """done, stopped (can be resumed) or error."""
    exit_code: int
    """As the process will exit."""
    step: int
    """Steps that are finished."""
    seconds: float
    """Wall time of this attempt."""
    lora: str | None = None
    """The finished LoRA, relative to the run directory."""
    ema_lora: str | None = None
    """That of the moving average."""
    model: str | None = None
    """The finished model of a full run: a diffusers folder, relative to the run directory."""
    ema_model: str | None = None
    """That of the moving average."""


EVENTS: dict[str, type[Event]] = {
    "run": RunEvent,
    "plan": PlanEvent,
    "phase": PhaseEvent,
    "progress": ProgressEvent,
    "step": StepEvent,
    "validation": ValidationEvent,
    "checkpoint": CheckpointEvent,
    "notice": NoticeEvent,
    "error": ErrorEvent,
    "end": EndEvent,
}


class EventLog:
    """Appends events to `path`. Only the holder of the run's lock opens one.

    A torn last line, which a killed process or a power cut left, is cut. Damaged lines stay where they are: ids and
    attempts follow the last line that can be read.

    Args:
        is_new_start: False ends the events of a start whose process is gone.

    Raises:
        DiskError: the file cannot be read or written.
    """

    def __init__(self, path: Path, *, is_new_start: bool = True) -> None:
        self.path = path
        with file_errors_reported(path):
            self._file = path.open("ab", buffering=0)
            try:
                cut_torn_line(path)
                with path.open("rb") as file:
                    last = next(events_backward(file), None)
                    is_refused = was_refused(file)
            except OSError:
                self._file.close()
                raise
        self._next_id = 1 if last is None else last["id"] + 1
        self.attempt: int = 1 if last is None else last["attempt"] + (is_new_start and not is_refused)
        self.start: int = 1 if last is None else start_of(last) + is_new_start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def emit(self, event: Event) -> None:
        """Write one line; it is in the system's hands when this returns.

        Raises:
            DiskError: the disk is full; nothing of the line stays in the file.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = {"v": SCHEMA_VERSION, "id": self._next_id, "time": now, "attempt": self.attempt, "start": self.start}
        line |= event.model_dump(mode="json")
        left = memoryview((json.dumps(line, ensure_ascii=False) + "\n").encode(errors=ESCAPED))
        with file_errors_reported(self.path):
            end = os.fstat(self._file.fileno()).st_size
            try:
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                self._file.truncate(end)
                raise
        self._next_id += 1


def parse_event(line: bytes | str) -> dict[str, Any] | None:
    """The event in a line; None for one that is blank, torn or damaged, or is no event."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict):
        return None
    numbers, texts = (event.get("id"), event.get("attempt")), (event.get("type"), event.get("time"))
    is_ours = all(type(number) is int and number > 0 for number in numbers) and all(isinstance(t, str) for t in texts)
    return event if is_ours else None


def start_of(event: dict[str, Any]) -> int:
    """Which start of the run an event belongs to. Files of older releases know attempts alone, one for each start."""
    start = event.get("start")
    return start if type(start) is int else int(event["attempt"])


def was_refused(file: BinaryIO) -> bool:
    """Whether the last start in a file of events ended with an error before it trained, which makes it no attempt.
    False for a start that an older release counted.
    """
    start: int | None = None
    has_ended = False
    for _, line in lines_backward(file):
        if has_ended and b'"type": "progress"' in line:  # there may be thousands
            continue
        event = parse_event(line)
        if event is None:
            continue
        kind = event["type"]
        if "start" not in event or start_of(event) != (start := start or start_of(event)):
            break
        if kind == "step" or (kind == "phase" and event.get("phase") == "train"):
            return False
        if kind == "end":
            has_ended = event.get("reason") == "error"
        if not has_ended and kind != "notice":  # trackers may say something after the end
            return False
    return has_ended


def last_losses(path: Path, step: int, count: int) -> list[float]:
    """The losses of the last `count` steps up to `step`, each of the last attempt that took it, oldest first."""
    losses: dict[int, float] = {}
    if step > 0 and path.exists():
        with path.open("rb") as file:
            for event in events_backward(file, mark=b'"type": "step"'):
                taken, loss = event.get("step"), event.get("loss")
                if event["type"] == "step" and type(taken) is int and taken <= step and type(loss) is float:
                    losses.setdefault(taken, loss)
                if len(losses) == count:
                    break
    return [losses[taken] for taken in sorted(losses)]


def read_events(path: Path, after: int = 0, kinds: Collection[str] = EVENTS) -> Iterator[dict[str, Any]]:
    """The events of the types `kinds` with an id above `after`, oldest first. Damaged lines are passed over; a torn
    last line is left for the next read.
    """
    if not path.exists():
        return
    marks = [f'"type": "{kind}"'.encode() for kind in kinds]
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            if any(mark in line for mark in marks):  # parsing takes most of the time
                event = parse_event(line)
                if event is not None and event["id"] > after and event["type"] in kinds:
                    yield event


def read_appended(path: Path, place: int) -> tuple[list[dict[str, Any]], int]:
    """The events that begin at byte `place` or after it, and the byte to go on from. Damaged lines are passed over."""
    if not path.exists():
        return [], place
    with path.open("rb") as file:
        file.seek(place)
        text = file.read()
    text = text[: text.rfind(b"\n") + 1]
    events = [event for line in text.splitlines() if (event := parse_event(line))]
    return events, place + len(text)


def cut_torn_line(path: Path) -> None:
    """Drop what follows the last newline: the line that a killed process was writing."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        keep = size
        while keep > 0:
            start = max(0, keep - BLOCK)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < size:
            file.truncate(keep)


def events_backward(file: BinaryIO, mark: bytes = b"") -> Iterator[dict[str, Any]]:
    """The events whose line holds `mark`, the last one first. Damaged lines are passed over."""
    for _, line in lines_backward(file, mark=mark):
        event = parse_event(line) if mark in line else None
        if event is not None:
            yield event


def lines_backward(file: BinaryIO, end: int | None = None, mark: bytes = b"") -> Iterator[tuple[int, bytes]]:
    """The whole lines before byte `end`, by default of the whole file; the last one first, each with where it begins.

    Blocks without `mark` are passed over whole.
    """
    end = file.seek(0, os.SEEK_END) if end is None else end
    rest = b""
    is_torn = True  # what follows the last newline is still being written
    while end > 0:
        start = max(0, end - BLOCK)
        file.seek(start)
        block = file.read(end - start) + rest
        if mark not in block:
            first = block.find(b"\n")
            is_torn = is_torn and first < 0
            rest, end = (block if first < 0 else block[:first]), start
            continue
        lines = block.split(b"\n")
        rest = lines.pop(0) if start > 0 else b""
        place = start + len(block)
        for line in reversed(lines):
            place -= len(line)
            if not is_torn:
                yield place, line
            is_torn = False
            place -= 1
        end = start
