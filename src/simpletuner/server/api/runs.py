"""Runs: list and details, curves, event stream, log and files; start, stop, save, validate, note and delete."""

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
from simpletuner.runs.process import ControlRequest, ask
from simpletuner.runs.removal import contents_of, delete_run
from simpletuner.runs.starting import start_record
from simpletuner.runs.status import status_of
from simpletuner.server.body import RequestBody
from simpletuner.server.commands import TrainRequest, train_arguments
from simpletuner.server.context import InContext, ServerContext
from simpletuner.server.faults import Fault
from simpletuner.server.pictures import ImageVersion
from simpletuner.server.runs import Run, RunName, output_folders, path_in_run, run_at, run_info
from simpletuner.server.series import DamagedText, PhaseState, decoded
from simpletuner.server.thumbnails import WIDTHS, picture_type

router = APIRouter()

LOG_BYTES = 64 * 1024
LARGEST_RUN_DOCUMENT = 8 * 1024 * 1024
LARGEST_ID = 2**53
ATTACHMENTS = {".json": "application/json", ".zip": "application/zip"}


class RunDetail(Run):
    """A run with its configuration, its plan and its events other than steps."""

    config: Any
    """Content of RUN/config.json."""
    datasets: Any
    """Content of RUN/datasets.json."""
    plan: dict[str, Any] | None
    """As `simpletuner plan --json` prints it."""
    remedy: dict[str, Any] | None
    """The smallest change that would make the run fit into memory."""
    attempts: int
    """Starts that reached training; those that ended with an error earlier do not count."""
    starts: int
    phases: list[PhaseState]
    validations: list[ValidationEvent]
    checkpoints: list[CheckpointEvent]
    notices: list[str]
    last_id: int
    damaged_lines: int
    """Lines of events.jsonl that are not events; they are skipped."""


class HeldOut(BaseModel):
    """Held-out losses by step."""

    step: list[int]
    loss: list[float]
    ema_loss: list[float | None]


class Drift(BaseModel):
    """How far images of unrelated prompts have moved from the base model's, by step."""

    step: list[int]
    drift: list[float]
    ema_drift: list[float | None]


class RunSeries(BaseModel):
    """The curves of a run: columns of equal length, with one row per step, from the last attempt that ran it."""

    last_id: int
    step: list[int]
    loss: list[float | None]
    lr: list[float | None]
    grad_norm: list[float | None]
    seconds: list[float | None]
    memory_gib: list[float | None]
    held_out: HeldOut
    drift: Drift


class RunLog(BaseModel):
    """The output of a run."""

    text: str
    """run.log from byte `after` on; only the last 64 KiB if that is longer."""
    size: int
    """Byte position in run.log where `text` ends; the next `after`. Smaller than `after` if the file was replaced."""
    console: str | None
    """The end of console.log, if the run was started without a terminal."""


class RunReference(RequestBody):
    """A run, by its folder."""

    run: str = Field(max_length=4096)


class NoteEdit(RunReference):
    """A run's new note."""

    text: str = Field(max_length=LONGEST_NOTE)
    seen: str | None = Field(default=None, max_length=2 * LONGEST_NOTE)
    """The note that the writer saw before the edit; null overwrites any."""


class RunFiles(BaseModel):
    """The content of a run's directory."""

    bytes: int
    files: int
    checkpoints: int
    images: int
    has_result: bool
    others: list[str]
    """Names of files and folders in the directory that do not belong to a run."""
    text: str
    """A summary in words."""


@router.get("/runs", response_model=list[Run], responses={304: {"description": "The client's list is current."}})
def runs(context: InContext, if_none_match: Annotated[str, Header(max_length=4096)] = "") -> Response:
    """All runs, the most recently started first."""
    body = context.run_list.listed(context.roots)
    headers = {"ETag": f'"{sha256_bytes(body)[:32]}"', "Cache-Control": "private, no-cache"}
    if headers["ETag"] in if_none_match:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.get("/run")
def run(context: InContext, run: RunName) -> RunDetail:
    """One run."""
    directory = run_at(context.roots, run)
    summary = context.streams.indexes.of(path_in_run(context.roots, directory, directory.events)).refresh()
    return RunDetail(
        **_run_info(context, directory).model_dump(),
        config=_document(context, directory, directory.config),
        datasets=_document(context, directory, directory.datasets),
        plan=None if summary.plan is None else summary.plan.plan,
        remedy=None if summary.plan is None else summary.plan.remedy,
        attempts=summary.attempts,
        starts=summary.starts,
        phases=list(summary.phases.values()),
        validations=list(summary.validations.values()),
        checkpoints=summary.checkpoints,
        notices=summary.notices,
        last_id=summary.last_id,
        damaged_lines=summary.damaged,
    )


@router.get("/run/series", response_model=RunSeries)
def series(context: InContext, run: RunName) -> Response:
    """The curves of a run."""
    directory = run_at(context.roots, run)
    index = context.streams.indexes.of(path_in_run(context.roots, directory, directory.events))
    # Already JSON: building models for 100,000 steps and serializing them would be slow.
    return Response(index.series(), media_type="application/json")


@router.get(
    "/run/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Server-sent events."}},
)
async def events(
    context: InContext,
    run: RunName,
    after: Annotated[int, Query(ge=0, le=LARGEST_ID)] = 0,
    last_event_id: Annotated[int | None, Header(ge=0, le=LARGEST_ID)] = None,
) -> StreamingResponse:
    """Stream the events of events.jsonl with an id above `Last-Event-ID`, or else above `after`; then new ones.

    If the run has no events yet, the stream waits. A message of the type "reset" says that the file was replaced and
    that its whole content follows.
    """
    directory = run_at(context.roots, run)
    path = path_in_run(context.roots, directory, directory.events)
    return StreamingResponse(
        context.streams.follow(path, after if last_event_id is None else last_event_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.get("/run/log")
def log(context: InContext, run: RunName, after: Annotated[int, Query(ge=0, le=LARGEST_ID)] = 0) -> RunLog:
    """The output of a run: run.log after byte `after`, and the end of console.log."""
    directory = run_at(context.roots, run)
    text, size = _appended(path_in_run(context.roots, directory, directory.log), after)
    console, _ = _appended(path_in_run(context.roots, directory, directory.console), 0)
    return RunLog(text=text, size=size, console=console or None)


@router.get(
    "/run/file",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        304: {"description": "The client's copy is current."},
    },
)
def file(
    context: InContext,
    run: RunName,
    path: Annotated[str, Query(max_length=4096)],
    width: Annotated[int | None, Query(ge=WIDTHS[0], le=WIDTHS[1])] = None,
    if_none_match: Annotated[str, Header(max_length=4096)] = "",
) -> Response:
    """A file of a run: an image as it is or, with `width`, as a JPEG at most that wide; other files as a download."""
    directory = run_at(context.roots, run)
    real = path_in_run(context.roots, directory, directory.root / path)
    if not real.is_file():
        raise Fault.of(404, f"{path}: no such file in this run")
    version = ImageVersion.of(real)
    # no-cache: the browser revalidates its copy, because a later run in the same folder replaces images.
    headers = {"ETag": version.tag(width), "Cache-Control": "private, no-cache"}
    if headers["ETag"] in if_none_match:
        return Response(status_code=304, headers=headers)
    try:
        kind = picture_type(real)
    except OSError as error:
        raise Fault.of(403, f"{path} cannot be read ({error.strerror})") from None
    if width is not None:
        return Response(context.thumbnails.of(version, width), media_type="image/jpeg", headers=headers)
    return FileResponse(
        real,
        media_type=kind or ATTACHMENTS.get(real.suffix, "application/octet-stream"),
        filename=real.name if real.suffix != ".safetensors" else f"{directory.root.name}-{real.name}",
        content_disposition_type="attachment" if kind is None else "inline",
        headers=headers,
    )


@router.post("/run/start")
def start(context: InContext, request: TrainRequest) -> Run:
    """Start or resume a run, like `simpletuner run start --no-wait`. The run does not depend on the server.

    Responds at once, while the run is starting. A second identical request during that time starts nothing.
    """
    arguments = train_arguments(context.roots, request)
    directory = RunDirectory(_checked_output(context, arguments, is_example=request.example is not None))
    try:
        launch_run(
            arguments, directory, context.workspace, devices_of(None), wait_s=0, environ=context.shell.environment()
        )
    except CheckpointError:
        record = start_record(directory)
        if record is None or record.arguments != tuple(arguments) or status_of(directory).state != "starting":
            raise
    return _run_info(context, directory)


def _checked_output(context: ServerContext, arguments: list[str], *, is_example: bool) -> Path:
    """Check a configuration and return its run directory.

    Raises:
        ConfigError: every problem, except those of an example's images, which only the command itself creates.
        Fault: 403, the directory lies outside the roots.
    """
    examined = examine(arguments, folder=context.workspace, environ=os.environ, rule=context.roots.refusal)
    ConfigError.raise_if(problem for problem in examined.problems if problem.key or not is_example)
    return context.roots.resolve(examined.config.output_dir)


@router.post("/run/stop")
def stop(context: InContext, reference: RunReference) -> Run:
    """Ask a run to finish its step, write a checkpoint and end."""
    return _requested(context, reference.run, "stop")


@router.post("/run/save")
def save(context: InContext, reference: RunReference) -> Run:
    """Ask a run for a checkpoint."""
    return _requested(context, reference.run, "save")


@router.post("/run/validate")
def validate(context: InContext, reference: RunReference) -> Run:
    """Ask a run for validation images."""
    return _requested(context, reference.run, "validate")


@router.put("/run/note")
def note(context: InContext, edit: NoteEdit) -> Run:
    """Write the note of a run: `simpletuner run note`. 409 if the note is no longer the one that the writer saw."""
    directory = run_at(context.roots, edit.run)
    try:
        write_note(directory, edit.text, edit.seen)
    except NoteChanged as error:
        raise Fault(409, *error.problems) from None
    return _run_info(context, directory)


@router.get("/run/contents")
def contents(context: InContext, run: RunName) -> RunFiles:
    """The files that deleting a run would delete."""
    run_contents = contents_of(run_at(context.roots, run))
    return RunFiles(**vars(run_contents), text=run_contents.text)


@router.delete("/run", status_code=204)
def delete(context: InContext, run: RunName) -> None:
    """Delete a run's directory with its whole content: `simpletuner run delete --yes`."""
    delete_run(run_at(context.roots, run), context.workspace)


def _run_info(context: ServerContext, directory: RunDirectory) -> Run:
    return run_info(context.roots, directory, dict(output_folders(context.roots)))


def _requested(context: ServerContext, run: str, control: ControlRequest) -> Run:
    directory = run_at(context.roots, run)
    path_in_run(context.roots, directory, directory.control)
    ask(directory, control)
    return _run_info(context, directory)


def _document(context: ServerContext, directory: RunDirectory, path: Path) -> Any:
    """Read a JSON file of the run; None if it is missing or damaged."""
    with contextlib.suppress(OSError, UnicodeDecodeError, DamagedText):
        real = path_in_run(context.roots, directory, path)
        if real.stat().st_size <= LARGEST_RUN_DOCUMENT:
            return decoded(real.read_text(encoding="utf-8-sig"))
    return None


def _appended(path: Path, after: int) -> tuple[str, int]:
    """Return the text after byte `after`, at most its last `LOG_BYTES`, and the position where it ends."""
    if not path.is_file():
        return "", 0
    with path.open("rb") as opened:
        size = opened.seek(0, 2)
        position = after if after <= size else 0
        begin = max(position, size - LOG_BYTES)
        opened.seek(begin)
        data = opened.read(size - begin)
    if begin > position:  # drop the partial first line
        data = data[data.find(b"\n") + 1 :]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(data)
    pending, _ = decoder.getstate()
    return text, size - len(pending)
