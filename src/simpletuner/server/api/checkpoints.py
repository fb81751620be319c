"""Checkpoints of a run: listed, verified, deleted."""

import datetime
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from simpletuner.runs import checkpoints as stored
from simpletuner.runs.layout import RunDirectory
from simpletuner.server.body import RequestBody
from simpletuner.server.commands import printed
from simpletuner.server.context import Context, InContext
from simpletuner.server.faults import Fault
from simpletuner.server.runs import RunName, part_of, run_at
from simpletuner.server.verdicts import size_of

router = APIRouter()

LATEST_STEP = 10**12

Step = Annotated[int, Query(ge=0, le=LATEST_STEP)]


class Checkpoint(BaseModel):
    """A checkpoint on the disk."""

    step: int
    path: str
    bytes: int
    time: str
    """When it was written; UTC, ISO 8601."""
    state: Literal["unverified", "good", "damaged"]
    damage: str | None
    """What is wrong with it."""


class OfStep(RequestBody):
    """Which checkpoint."""

    run: str = Field(max_length=4096)
    step: int = Field(ge=0, le=LATEST_STEP)


@router.get("/run/checkpoints")
def checkpoints(here: InContext, run: RunName) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first. Their files are not read: see verify."""
    directory = run_at(here.roots, run)
    folders = [(step, _folder(here, directory, step)) for step in stored.steps(directory)]
    return [_told(here, step, folder) for step, folder in folders]


@router.post("/run/checkpoint/verify")
def verify(here: InContext, of: OfStep) -> Checkpoint:
    """Compare every file of a checkpoint with the hash in its manifest."""
    folder = _existing(here, run_at(here.roots, of.run), of.step)
    here.verdicts.verify(folder)
    return _told(here, of.step, folder)


@router.delete("/run/checkpoint", status_code=204)
async def delete(here: InContext, run: RunName, step: Step, confirm: Annotated[str, Query(max_length=20)] = "") -> None:
    """Delete a checkpoint; `confirm` is its step once more."""
    directory = run_at(here.roots, run)
    _existing(here, directory, step)
    if confirm != str(step):
        raise Fault.of(422, f"confirm = {confirm!r}", f"{step}, the step of the checkpoint that goes")
    where = here.roots.shown(directory.root)
    printed(await here.shell.run("checkpoint", "delete", "--json", "--yes", f"--step={step}", where))


def _existing(here: Context, directory: RunDirectory, step: int) -> Path:
    if step not in stored.steps(directory):
        raise Fault.of(404, f"there is no checkpoint of step {step}", remedy="It may have been pruned.")
    return _folder(here, directory, step)


def _folder(here: Context, directory: RunDirectory, step: int) -> Path:
    return part_of(here.roots, directory, directory.checkpoint(step))


def _told(here: Context, step: int, folder: Path) -> Checkpoint:
    is_known, found = here.verdicts.known(folder)
    manifest = folder / stored.MANIFEST
    written = (manifest if manifest.is_file() else folder).stat().st_mtime
    return Checkpoint(
        step=step,
        path=here.roots.shown(folder),
        bytes=size_of(folder),
        time=datetime.datetime.fromtimestamp(written, datetime.UTC).isoformat(timespec="milliseconds"),
        state="unverified" if not is_known else "good" if found is None else "damaged",
        damage=found,
    )
