"""The events of a run as typed JSON Lines: the only file that the page, trackers and scripts read.

Each line also has `v` (schema version), `id` (counts up without gaps, also over restarts), `time` (UTC, ISO 8601),
`attempt` (1 for the first start, one more after each restart, unchanged after a refused start) and `start` (one more at
each start). After a resume some steps appear twice: readers use the line of the last attempt.
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
"""Number of bytes read at once, from the end of the file backward."""

Phase = Literal["scan", "text", "latents", "load", "train", "validation", "export"]

TITLES: dict[Phase, str] = {
    "scan": "scanning the images",
    "text": "encoding captions",
    "latents": "encoding images",
    "load": "loading the transformer",
    "train": "training",
    "validation": "validating",
    "export": "writing the result",
}
"""The phases in words, for messages."""


class Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunEvent(Event):
    """The command started or resumed this run."""

    type: Literal["run"] = "run"
    program: str
    """Name and version of the program."""
    pid: int
    """Id of the process that trains the run."""
    resumed_from: int | None
    """Step of the checkpoint from which the run resumes; null at a fresh start."""
    steps: int
    """Total optimizer steps of the run."""
    pictures: int
    """Number of training images, without repeats."""
    trainable: int
    """Number of trainable parameters."""
    processes: int = 1
    """Number of processes that train together (the world size)."""
    engine: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "single"
    """single (one process), ddp (each holds the whole model), fsdp2 (each holds a shard of it), or a stage of ZeRO."""


class PlanEvent(Event):
    """Planned use of memory and disk, before anything is loaded; a second plan follows when the images are known."""

    type: Literal["plan"] = "plan"
    plan: dict[str, Any]
    """The plan as `simpletuner plan --json` prints it, in bytes. [plan.md](plan.md) describes each key."""
    remedy: dict[str, Any] | None
    """The smallest change with which the run would fit; null if it fits, or if no change helps."""


class PhaseEvent(Event):
    """A phase began or ended."""

    type: Literal["phase"] = "phase"
    phase: Phase
    """scan, text, latents, load, train, validation or export."""
    state: Literal["begin", "end"]
    """begin or end."""
    seconds: float | None = None
    """Duration of the phase, at its end."""
    memory_gib: float | None = None
    """Peak memory of the phase, without phases inside it, in GiB, at its end: memory that the allocator reserved on the
    accelerator or, on a CPU, resident memory of the process."""
    memory_allocated_gib: float | None = None
    """Peak of the memory that tensors used, in GiB; null on a CPU."""


class ProgressEvent(Event):
    """Progress of a phase other than training."""

    type: Literal["progress"] = "progress"
    phase: Phase
    """The phase in progress."""
    done: int
    """Number of finished items."""
    total: int
    """Number of all items."""
    per_s: float
    """Items per second since the phase began."""
    eta_s: float
    """Remaining seconds at that rate."""


class StepEvent(Event):
    """One optimizer step."""

    type: Literal["step"] = "step"
    step: int
    """Counts from 1."""
    epoch: int
    """Epoch of the step's first sample, from 0."""
    loss: float
    """Mean loss of this step's samples only. The console shows the average of the last 20 steps."""
    lr: float
    """Learning rate of the step."""
    grad_norm: float
    """Global gradient norm before clipping."""
    seconds: float
    """Wall time of the step."""
    preservation_loss: float | None = None
    """Mean over the samples of the weighted `preservation` loss, which `loss` excludes; null without that option.
    [preservation.md](preservation.md) explains it."""
    rollout_calls: int = 0
    """Model calls without gradients that scheduled sampling added to the step."""
    memory_gib: float
    """Peak memory of the training phase so far, in GiB: memory that the allocator reserved on the accelerator or, on a
    CPU, resident memory of the process."""
    memory_allocated_gib: float | None = None
    """Peak of the memory that tensors used, in GiB; null on a CPU."""
    images_per_s: float | None = None
    """Training images per second, over all processes. [performance.md](performance.md) explains this and the following
    fields."""
    tflop_per_s: float | None = None
    """TFLOP/s of this process's device: matrix products and attention of forward and backward, without recompute."""
    mfu: float | None = None
    """`tflop_per_s` divided by the device's data-sheet rate for dense bf16, 0 to 1; null if that rate is unknown."""
    hfu: float | None = None
    """The same ratio with recompute included."""


class Picture(Event):
    """One validation image."""

    name: str
    """Name of the prompt in the prompt library."""
    prompt: str
    """The prompt as it was encoded."""
    references: tuple[str, ...] = ()
    """Reference images: paths as in the prompt library, relative to the working directory."""
    path: str
    """Image file, relative to the run directory."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    seed: int
    """Seed of the initial noise."""
    is_ema: bool = False
    """Whether it was generated with the moving average (EMA) of the weights."""


class ValidationEvent(Event):
    """Validation images were generated, or the held-out loss was measured."""

    type: Literal["validation"] = "validation"
    step: int
    """0 is the base model."""
    pictures: tuple[Picture, ...] = ()
    """The generated images. A notice names each image that failed."""
    sheet: str | None = None
    """Contact sheet, relative to the run directory; null if it could not be made, or if only the loss was measured."""
    loss: float | None = None
    """Held-out loss at fixed sigmas and noise, mean over the images."""
    loss_by_sigma: dict[str, float] = {}
    """Held-out loss at each sigma."""
    ema_loss: float | None = None
    """Held-out loss of the moving average."""
    drift: float | None = None
    """Distance of the images of `validation_drift_prompts` from the base model's, mean over the prompts: RMS difference
    of the final latents over the RMS of the base model's. 0 means no change, about 1 an image from other noise."""
    drift_by_prompt: dict[str, float] = {}
    """Drift of each prompt; with `ema_validation` ema_only that of the moving average."""
    ema_drift: float | None = None
    """Mean drift of the moving average."""


class CheckpointEvent(Event):
    """A checkpoint was written, pruned, or found damaged."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    """Step of the checkpoint."""
    state: Literal["saved", "pruned", "damaged", "resumed"]
    """saved, pruned, damaged or resumed."""
    path: str
    """Folder, relative to the run directory."""
    bytes: int = 0
    """Size on disk, if saved."""
    reason: str | None = None
    """The damage, if damaged."""


class NoticeEvent(Event):
    """Information for the user that needs no action."""

    type: Literal["notice"] = "notice"
    text: str
    """One line."""


class ErrorEvent(Event):
    """The run is about to end with an error."""

    type: Literal["error"] = "error"
    exit_code: int
    """Exit code of the process."""
    text: str
    """Finding, expectation and remedy."""


class EndEvent(Event):
    """The last event of an attempt."""

    type: Literal["end"] = "end"
    reason: Literal["done", "stopped", "error"]
    """done, stopped (can be resumed) or error."""
    exit_code: int
    """Exit code of the process."""
    step: int
    """Number of finished steps."""
    seconds: float
    """Wall time of this attempt."""
    lora: str | None = None
    """The finished LoRA, relative to the run directory."""
    ema_lora: str | None = None
    """The finished LoRA of the moving average."""
    model: str | None = None
    """The finished model of a full run: a diffusers folder, relative to the run directory."""
    ema_model: str | None = None
    """The finished model of the moving average."""


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
    """Appends events to `path`. The caller must hold the run's lock.

    An incomplete last line, left by a killed process or a power failure, is removed. Damaged lines are left in place:
    ids and attempts continue from the last readable line.

    Args:
        is_new_start: False to append to the last start, whose process no longer exists.

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
        """Write one line. It has been passed to the operating system when this returns.

        Raises:
            DiskError: the disk is full; no part of the line stays in the file.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = {"v": SCHEMA_VERSION, "id": self._next_id, "time": now, "attempt": self.attempt, "start": self.start}
        line |= event.model_dump(mode="json")
        unwritten = memoryview((json.dumps(line, ensure_ascii=False) + "\n").encode(errors=ESCAPED))
        with file_errors_reported(self.path):
            end = os.fstat(self._file.fileno()).st_size
            try:
                while unwritten:
                    unwritten = unwritten[self._file.write(unwritten) :]
            except OSError:
                self._file.truncate(end)
                raise
        self._next_id += 1


def parse_event(line: bytes | str) -> dict[str, Any] | None:
    """Parse the event in a line. None if the line is blank, incomplete or damaged, or is not an event."""
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
    """Number of the start to which an event belongs. Older releases wrote only `attempt`, one per start."""
    start = event.get("start")
    return start if type(start) is int else int(event["attempt"])


def was_refused(file: BinaryIO) -> bool:
    """Whether the last start in an events file ended with an error before it trained; it then does not count as an
    attempt. False for starts written by older releases, which counted them.
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
        if not has_ended and kind != "notice":  # trackers may write notices after the end
            return False
    return has_ended


def last_losses(path: Path, step: int, count: int) -> list[float]:
    """Losses of the last `count` steps up to `step`, oldest first, each from the last attempt with that step."""
    losses: dict[int, float] = {}
    if step > 0 and path.exists():
        with path.open("rb") as file:
            for event in events_backward(file, mark=b'"type": "step"'):
                number, loss = event.get("step"), event.get("loss")
                if event["type"] == "step" and type(number) is int and number <= step and type(loss) is float:
                    losses.setdefault(number, loss)
                if len(losses) == count:
                    break
    return [losses[number] for number in sorted(losses)]


def read_events(path: Path, after: int = 0, kinds: Collection[str] = EVENTS) -> Iterator[dict[str, Any]]:
    """Yield the events of the types `kinds` with an id above `after`, oldest first. Damaged lines are skipped; an
    incomplete last line is left for the next read.
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


def read_appended(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The events from byte `offset` on, and the byte at which to continue reading. Damaged lines are skipped."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    text = text[: text.rfind(b"\n") + 1]
    events = [event for line in text.splitlines() if (event := parse_event(line))]
    return events, offset + len(text)


def cut_torn_line(path: Path) -> None:
    """Remove the bytes after the last newline: an incomplete line of a killed process."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def events_backward(file: BinaryIO, mark: bytes = b"") -> Iterator[dict[str, Any]]:
    """Yield the events whose line contains `mark`, the last one first. Damaged lines are skipped."""
    for _, line in lines_backward(file, mark=mark):
        event = parse_event(line) if mark in line else None
        if event is not None:
            yield event


def lines_backward(file: BinaryIO, end: int | None = None, mark: bytes = b"") -> Iterator[tuple[int, bytes]]:
    """Yield the complete lines before byte `end` (by default the end of the file), the last line first, each with the
    byte at which it begins.

    Blocks without `mark` are skipped.
    """
    end = file.seek(0, os.SEEK_END) if end is None else end
    remainder = b""
    is_torn = True  # the bytes after the last newline are an incomplete line
    while end > 0:
        start = max(0, end - BLOCK)
        file.seek(start)
        block = file.read(end - start) + remainder
        if mark not in block:
            first = block.find(b"\n")
            is_torn = is_torn and first < 0
            remainder, end = (block if first < 0 else block[:first]), start
            continue
        lines = block.split(b"\n")
        remainder = lines.pop(0) if start > 0 else b""
        offset = start + len(block)
        for line in reversed(lines):
            offset -= len(line)
            if not is_torn:
                yield offset, line
            is_torn = False
            offset -= 1
        end = start
