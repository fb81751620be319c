"""The queue of runs: those that wait for their turn, one at a time for each set of devices."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from simpletuner.runs.queue import EntryState, Queue, QueueEntry, QueueMove
from simpletuner.server.body import RequestBody
from simpletuner.server.commands import ToTrain, printed, train_arguments
from simpletuner.server.context import InContext

router = APIRouter()

DEVICES = r"^[A-Za-z0-9,:_./-]*$"


class QueuedRun(BaseModel):
    """A run of the queue."""

    id: int
    arguments: list[str]
    """What follows `simpletuner train`."""
    environment: str | None
    """Where it trains one: empty for the one without a name."""
    example: str | None
    output_dir: str
    devices: str
    """For CUDA_VISIBLE_DEVICES; empty is what the machine has."""
    state: EntryState
    exit_code: int | None
    error: str | None
    """Why it failed."""
    added: str
    """UTC, ISO 8601, as the other times."""
    began: str | None
    ended: str | None


class ToQueue(ToTrain):
    """What to train when its turn comes, and on what."""

    devices: str = Field(default="", pattern=DEVICES, max_length=256)


class ToMove(RequestBody):
    """Which entry, and where to."""

    id: Annotated[int, Field(ge=1, le=10**12)]
    to: QueueMove | Annotated[int, Field(ge=1, le=10**6)]
    """One place up or down, to the top, or a place counted from 1."""


@router.get("/queue")
def queue(here: InContext) -> list[QueuedRun]:
    """Every entry, in the order they are taken; those that ended first."""
    return [_told(entry) for entry in Queue.of(here.workspace).entries()]


@router.post("/queue", status_code=201)
async def add(here: InContext, wanted: ToQueue, request: Request) -> QueuedRun:
    """Put a run at the end of the queue, as `simpletuner run queue add` does; it starts when its turn comes."""
    devices = [f"--devices={wanted.devices}"] if wanted.devices else []
    arguments = train_arguments(here.roots, wanted)
    told = printed(await here.shell.run("run", "queue", "add", "--json", *devices, *arguments, request=request))
    return _told(QueueEntry.model_validate(told))


@router.post("/queue/move")
def move(here: InContext, wanted: ToMove) -> list[QueuedRun]:
    """Change the turn of an entry that waits: `simpletuner run queue move`."""
    Queue.of(here.workspace).move(wanted.id, wanted.to)
    return queue(here)


@router.post("/queue/resume")
async def resume(here: InContext) -> list[QueuedRun]:
    """Go on with what waits after the machine was switched off or a disk was full: `simpletuner run queue resume`."""
    printed(await here.shell.run("run", "queue", "resume", "--json"))
    return await asyncio.to_thread(queue, here)


@router.delete("/queue", status_code=204)
def remove(here: InContext, id: Annotated[int, Query(ge=1, le=10**12)]) -> None:  # noqa: A002  as the API calls it
    """Take an entry out that waits or has ended. What it trained stays."""
    Queue.of(here.workspace).remove(id)


def _told(entry: QueueEntry) -> QueuedRun:
    named = {
        word.removeprefix("--").partition("=")[0]: word.partition("=")[2]
        for word in entry.arguments
        if word.startswith(("--env=", "--config=", "--example="))
    }
    environment = named.get("env")
    if environment is None and named.get("config", "").startswith("config/config."):
        environment = ""
    return QueuedRun(
        **entry.model_dump(include=set(QueueEntry.model_fields)), environment=environment, example=named.get("example")
    )
