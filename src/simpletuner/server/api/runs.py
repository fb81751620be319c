"""Runs: the list, one of them, its curves, its events as they come, its log and files; start, stop, save, validate,
note, delete."""

import codecs
import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field

from simpletuner.base.errors import CheckpointError, ConfigError
from simpletuner.base.files import sha256_bytes
from simpletuner.config.load import examine
from simpletuner.runs.events import CheckpointEvent, ValidationEvent
from simpletuner.runs.launch import devices_of, launch_run
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.note import LONGEST_NOTE, NoteChanged, write_note
from simpletuner.runs.process import ControlRequest as Wish
from simpletuner.runs.process import ask
from simpletuner.runs.removal import contents_of, delete_run
from simpletuner.runs.starting import start_record
from simpletuner.runs.status import status_of
from simpletuner.server.body import RequestBody
from simpletuner.server.commands import ToTrain, train_arguments
from simpletuner.server.context import Context, InContext
from simpletuner.server.faults import Fault
from simpletuner.server.pictures import Version
from simpletuner.server.runs import Run, RunName, glance, output_folders, part_of, run_at
from simpletuner.server.series import Damaged, PhaseState, decoded
from simpletuner.server.thumbnails import WIDTHS, picture_type

router = APIRouter()

LOG_BYTES = 64 * 1024
LARGEST_RUN_DOCUMENT = 8 * 1024 * 1024
LARGEST_ID = 2**53
ATTACHMENTS = {".json": "application/json", ".zip": "application/zip"}


class RunDetail(Run):
    """A run, with what its events say beside the steps."""

    config: Any
    """RUN/config.json."""
    datasets: Any
    """RUN/datasets.json."""
    plan: dict[str, Any] | None
    """As `simpletuner plan --json` prints it."""
    remedy: dict[str, Any] | None
    """The smallest change that would make it fit."""
    attempts: int
    """Starts that were not refused: those that ended with an error before they trained are none."""
    starts: int
    phases: list[PhaseState]
    validations: list[ValidationEvent]
    checkpoints: list[CheckpointEvent]
    notices: list[str]
    last_id: int
    damaged_lines: int
    """Lines of events.jsonl that are no events; they are passed over."""


class HeldOut(BaseModel):
    """Held-out losses by step."""

    step: list[int]
    loss: list[float]
    ema_loss: list[float | None]


class Drift(BaseModel):
    """How far images of unrelated prompts moved from the base model's, by step."""

    step: list[int]
    drift: list[float]
    ema_drift: list[float | None]


class RunSeries(BaseModel):
    """The curves of a run: equally long columns, each step once, of its last attempt."""

    last_id: int
    step: list[int]
    loss: list[float | None]
    lr: list[float | None]
    grad_norm: list[float | None]
    seconds: list[float | None]
    memory_gib: list[float | None]
    held_out: HeldOut
    drift: Drift


class Log(BaseModel):
    """What a run printed."""

    text: str
    """Of run.log, what follows `after`; at most the last part."""
    size: int
    """Bytes of run.log up to the end of `text`: the next `after`. Smaller than the last where it began anew."""
    console: str | None
    """The end of console.log, where the run was started without a terminal."""


class OfRun(RequestBody):
    """Which run."""

    run: str = Field(max_length=4096)


class ToNote(OfRun):
    """A note."""

    text: str = Field(max_length=LONGEST_NOTE)
    seen: str | None = Field(default=None, max_length=2 * LONGEST_NOTE)
    """The note that the writer saw before; null overwrites any."""


class Contents(BaseModel):
    """What lies in a run's directory."""

    bytes: int
    files: int
    checkpoints: int
    images: int
    has_result: bool
    others: list[str]
    """Names in the directory of what no run writes."""
    text: str
    """All of it in words."""


@router.get("/runs", response_model=list[Run], responses={304: {"description": "The list is what the client has."}})
def runs(here: InContext, if_none_match: Annotated[str, Header(max_length=4096)] = "") -> Response:
    """The runs that are there, the one that was started last first."""
    body = here.glances.listed(here.roots)
    headers = {"ETag": f'"{sha256_bytes(body)[:32]}"', "Cache-Control": "private, no-cache"}
    if headers["ETag"] in if_none_match:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.get("/run")
def run(here: InContext, run: RunName) -> RunDetail:
    """One run."""
    directory = run_at(here.roots, run)
    told = here.streams.indexes.of(part_of(here.roots, directory, directory.events)).look()
    return RunDetail(
        **_glance(here, directory).model_dump(),
        config=_document(here, directory, directory.config),
        datasets=_document(here, directory, directory.datasets),
        plan=None if told.plan is None else told.plan.plan,
        remedy=None if told.plan is None else told.plan.remedy,
        attempts=told.attempts,
        starts=told.starts,
        phases=list(told.phases.values()),
        validations=list(told.validations.values()),
        checkpoints=told.checkpoints,
        notices=told.notices,
        last_id=told.last_id,
        damaged_lines=told.damaged,
    )


@router.get("/run/series", response_model=RunSeries)
def series(here: InContext, run: RunName) -> Response:
    """The curves of a run."""
    directory = run_at(here.roots, run)
    index = here.streams.indexes.of(part_of(here.roots, directory, directory.events))
    # Already JSON: 100,000 steps are not read into models and written again.
    return Response(index.series(), media_type="application/json")


@router.get(
    "/run/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Server-sent events."}},
)
async def events(
    here: InContext,
    run: RunName,
    after: Annotated[int, Query(ge=0, le=LARGEST_ID)] = 0,
    last_event_id: Annotated[int | None, Header(ge=0, le=LARGEST_ID)] = None,
) -> StreamingResponse:
    """The lines of events.jsonl with an id above `Last-Event-ID`, or else `after`; then those that are appended.

    A run without events yet is waited for. A message of the type "reset" says that the file began anew and all of it
    follows.
    """
    directory = run_at(here.roots, run)
    path = part_of(here.roots, directory, directory.events)
    return StreamingResponse(
        here.streams.follow(path, after if last_event_id is None else last_event_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.get("/run/log")
def log(here: InContext, run: RunName, after: Annotated[int, Query(ge=0, le=LARGEST_ID)] = 0) -> Log:
    """What a run printed after byte `after` of run.log, and the end of its console.log."""
    directory = run_at(here.roots, run)
    text, size = _appended(part_of(here.roots, directory, directory.log), after)
    console, _ = _appended(part_of(here.roots, directory, directory.console), 0)
    return Log(text=text, size=size, console=console or None)


@router.get(
    "/run/file",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}, 304: {"description": "It is what the client has."}},
)
def file(
    here: InContext,
    run: RunName,
    path: Annotated[str, Query(max_length=4096)],
    width: Annotated[int | None, Query(ge=WIDTHS[0], le=WIDTHS[1])] = None,
    if_none_match: Annotated[str, Header(max_length=4096)] = "",
) -> Response:
    """A file below a run: a picture as it is or, with `width`, as a JPEG at most so wide; others to be saved."""
    directory = run_at(here.roots, run)
    real = part_of(here.roots, directory, directory.root / path)
    if not real.is_file():
        raise Fault.of(404, f"{path}: no such file in this run")
    version = Version.of(real)
    # no-cache: the browser keeps it and asks whether it is still that; a run of the same folder draws anew.
    headers = {"ETag": version.tag(width), "Cache-Control": "private, no-cache"}
    if headers["ETag"] in if_none_match:
        return Response(status_code=304, headers=headers)
    try:
        kind = picture_type(real)
    except OSError as error:
        raise Fault.of(403, f"{path} cannot be read ({error.strerror})") from None
    if width is not None:
        return Response(here.thumbnails.of(version, width), media_type="image/jpeg", headers=headers)
    return FileResponse(
        real,
        media_type=kind or ATTACHMENTS.get(real.suffix, "application/octet-stream"),
        filename=real.name if real.suffix != ".safetensors" else f"{directory.root.name}-{real.name}",
        content_disposition_type="attachment" if kind is None else "inline",
        headers=headers,
    )


@router.post("/run/start")
def start(here: InContext, wanted: ToTrain) -> Run:
    """Start a run, or go on with one, as `simpletuner run start --no-wait` does. It goes on without the server.

    The answer comes at once; the run is starting. A second start with the same words, while it is, is the same start.
    """
    arguments = train_arguments(here.roots, wanted)
    directory = RunDirectory(_checked_output(here, arguments, is_example=wanted.example is not None))
    try:
        launch_run(arguments, directory, here.workspace, devices_of(None), wait_s=0, environ=here.shell.environment())
    except CheckpointError:
        record = start_record(directory)
        if record is None or record.arguments != tuple(arguments) or status_of(directory).state != "starting":
            raise
    return _glance(here, directory)


def _checked_output(here: Context, arguments: list[str], *, is_example: bool) -> Path:
    """The run directory of a configuration that has no problems.

    Raises:
        ConfigError: every problem, except those that the command itself finds: an example's images are drawn first.
        Fault: 403, the directory lies outside the roots.
    """
    examined = examine(arguments, folder=here.workspace, environ=os.environ, rule=here.roots.refusal)
    ConfigError.raise_if(problem for problem in examined.problems if problem.key or not is_example)
    return here.roots.resolve(examined.config.output_dir)


@router.post("/run/stop")
def stop(here: InContext, of: OfRun) -> Run:
    """Ask a run to finish its step, write a checkpoint and end."""
    return _wish(here, of.run, "stop")


@router.post("/run/save")
def save(here: InContext, of: OfRun) -> Run:
    """Ask a run for a checkpoint."""
    return _wish(here, of.run, "save")


@router.post("/run/validate")
def validate(here: InContext, of: OfRun) -> Run:
    """Ask a run for validation pictures."""
    return _wish(here, of.run, "validate")


@router.put("/run/note")
def note(here: InContext, wanted: ToNote) -> Run:
    """Write the note of a run: `simpletuner run note`. 409 where it is no longer what the writer saw."""
    directory = run_at(here.roots, wanted.run)
    try:
        write_note(directory, wanted.text, wanted.seen)
    except NoteChanged as error:
        raise Fault(409, *error.problems) from None
    return _glance(here, directory)


@router.get("/run/contents")
def contents(here: InContext, run: RunName) -> Contents:
    """What would be deleted with a run."""
    found = contents_of(run_at(here.roots, run))
    return Contents(**vars(found), text=found.text)


@router.delete("/run", status_code=204)
def delete(here: InContext, run: RunName) -> None:
    """Delete a run's directory with all that is in it: `simpletuner run delete --yes`."""
    delete_run(run_at(here.roots, run), here.workspace)


def _glance(here: Context, directory: RunDirectory) -> Run:
    return glance(here.roots, directory, dict(output_folders(here.roots)))


def _wish(here: Context, run: str, wish: Wish) -> Run:
    directory = run_at(here.roots, run)
    part_of(here.roots, directory, directory.control)
    ask(directory, wish)
    return _glance(here, directory)


def _document(here: Context, directory: RunDirectory, path: Path) -> Any:
    """A JSON file of the run; None where it is missing or damaged."""
    with contextlib.suppress(OSError, UnicodeDecodeError, Damaged):
        real = part_of(here.roots, directory, path)
        if real.stat().st_size <= LARGEST_RUN_DOCUMENT:
            return decoded(real.read_text(encoding="utf-8-sig"))
    return None


def _appended(path: Path, after: int) -> tuple[str, int]:
    """What follows byte `after`, the last `LOG_BYTES` of it at most, and the byte where that ends."""
    if not path.is_file():
        return "", 0
    with path.open("rb") as opened:
        size = opened.seek(0, 2)
        place = after if after <= size else 0
        begin = max(place, size - LOG_BYTES)
        opened.seek(begin)
        data = opened.read(size - begin)
    if begin > place:  # no half lines
        data = data[data.find(b"\n") + 1 :]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(data)
    pending, _ = decoder.getstate()
    return text, size - len(pending)
