"""The queue of runs. Runs on the same devices start one after another."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from simpletuner.runs.queue import EntryState, Queue, QueueEntry, QueueMove
from simpletuner.server.body import RequestBody
from simpletuner.server.commands import TrainRequest, printed_json, train_arguments
from simpletuner.server.context import InContext

router = APIRouter()

DEVICES = r"^[A-Za-z0-9,:_./-]*$"


class QueuedRun(BaseModel):
    """An entry of the queue."""

    id: int
    arguments: list[str]
    """The arguments of `simpletuner train`."""
    environment: str | None
    """The environment that it trains, if any; empty for the unnamed one."""
    example: str | None
    output_dir: str
    devices: str
    """Value for CUDA_VISIBLE_DEVICES; empty for all of the machine's GPUs."""
    state: EntryState
    exit_code: int | None
    error: str | None
    """Why it failed."""
    added: str
    """UTC, ISO 8601, like the other times."""
    began: str | None
    ended: str | None


class QueueRequest(TrainRequest):
    """What to train, and the devices to train on."""

    devices: str = Field(default="", pattern=DEVICES, max_length=256)


class QueueMoveRequest(RequestBody):
    """An entry to move, and its new position."""

    id: Annotated[int, Field(ge=1, le=10**12)]
    to: QueueMove | Annotated[int, Field(ge=1, le=10**6)]
    """One position up or down, to the top, or a position counted from 1."""


@router.get("/queue")
def queue(context: InContext) -> list[QueuedRun]:
    """Every entry: the ended ones, then the others in the order in which they start."""
    return [_queued_run(entry) for entry in Queue.of(context.workspace).entries()]


@router.post("/queue", status_code=201)
async def add(context: InContext, body: QueueRequest, request: Request) -> QueuedRun:
    """Add a run at the end of the queue: `simpletuner run queue add`. It starts once the runs before it have ended."""
    devices = [f"--devices={body.devices}"] if body.devices else []
    arguments = train_arguments(context.roots, body)
    entry = printed_json(
        await context.shell.run("run", "queue", "add", "--json", *devices, *arguments, request=request)
    )
    return _queued_run(QueueEntry.model_validate(entry))


@router.post("/queue/move")
def move(context: InContext, body: QueueMoveRequest) -> list[QueuedRun]:
    """Move a waiting entry: `simpletuner run queue move`."""
    Queue.of(context.workspace).move(body.id, body.to)
    return queue(context)


@router.post("/queue/resume")
async def resume(context: InContext) -> list[QueuedRun]:
    """Start waiting runs again after the machine was off or a disk was full: `simpletuner run queue resume`."""
    printed_json(await context.shell.run("run", "queue", "resume", "--json"))
    return await asyncio.to_thread(queue, context)


@router.delete("/queue", status_code=204)
def remove(context: InContext, id: Annotated[int, Query(ge=1, le=10**12)]) -> None:  # noqa: A002  as the API calls it
    """Remove a waiting or ended entry. Its run directory stays."""
    Queue.of(context.workspace).remove(id)


def _queued_run(entry: QueueEntry) -> QueuedRun:
    sources = {
        word.removeprefix("--").partition("=")[0]: word.partition("=")[2]
        for word in entry.arguments
        if word.startswith(("--env=", "--config=", "--example="))
    }
    environment = sources.get("env")
    if environment is None and sources.get("config", "").startswith("config/config."):
        environment = ""
    return QueuedRun(
        **entry.model_dump(include=set(QueueEntry.model_fields)),
        environment=environment,
        example=sources.get("example"),
    )
