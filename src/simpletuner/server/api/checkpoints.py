"""List, verify and delete the checkpoints of a run."""

import datetime
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from simpletuner.runs import checkpoints as stored
from simpletuner.runs.layout import RunDirectory
from simpletuner.server.body import RequestBody
from simpletuner.server.commands import printed_json
from simpletuner.server.context import InContext, ServerContext
from simpletuner.server.faults import Fault
from simpletuner.server.runs import RunName, path_in_run, run_at
from simpletuner.server.verdicts import size_of

router = APIRouter()

LATEST_STEP = 10**12

Step = Annotated[int, Query(ge=0, le=LATEST_STEP)]


class Checkpoint(BaseModel):
    """A checkpoint on disk."""

    step: int
    path: str
    bytes: int
    time: str
    """Time of writing; UTC, ISO 8601."""
    state: Literal["unverified", "good", "damaged"]
    damage: str | None
    """What is damaged; null if nothing is known to be."""


class CheckpointReference(RequestBody):
    """A checkpoint, by its run and step."""

    run: str = Field(max_length=4096)
    step: int = Field(ge=0, le=LATEST_STEP)


@router.get("/run/checkpoints")
def checkpoints(context: InContext, run: RunName) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first. Their files are not read; verify does that."""
    directory = run_at(context.roots, run)
    folders = [(step, _folder(context, directory, step)) for step in stored.steps(directory)]
    return [_checkpoint_info(context, step, folder) for step, folder in folders]


@router.post("/run/checkpoint/verify")
def verify(context: InContext, reference: CheckpointReference) -> Checkpoint:
    """Compare every file of a checkpoint with the hash in its manifest."""
    folder = _existing(context, run_at(context.roots, reference.run), reference.step)
    context.verdicts.verify(folder)
    return _checkpoint_info(context, reference.step, folder)


@router.delete("/run/checkpoint", status_code=204)
async def delete(
    context: InContext, run: RunName, step: Step, confirm: Annotated[str, Query(max_length=20)] = ""
) -> None:
    """Delete a checkpoint; `confirm` must repeat its step."""
    directory = run_at(context.roots, run)
    _existing(context, directory, step)
    if confirm != str(step):
        raise Fault.of(422, f"confirm = {confirm!r}", f"{step}, the step of the checkpoint to delete")
    shown_root = context.roots.display_path(directory.root)
    printed_json(await context.shell.run("checkpoint", "delete", "--json", "--yes", f"--step={step}", shown_root))


def _existing(context: ServerContext, directory: RunDirectory, step: int) -> Path:
    if step not in stored.steps(directory):
        raise Fault.of(404, f"there is no checkpoint at step {step}", remedy="It may have been pruned.")
    return _folder(context, directory, step)


def _folder(context: ServerContext, directory: RunDirectory, step: int) -> Path:
    return path_in_run(context.roots, directory, directory.checkpoint(step))


def _checkpoint_info(context: ServerContext, step: int, folder: Path) -> Checkpoint:
    is_verified, damaged = context.verdicts.verdict(folder)
    manifest = folder / stored.MANIFEST
    written_at = (manifest if manifest.is_file() else folder).stat().st_mtime
    return Checkpoint(
        step=step,
        path=context.roots.display_path(folder),
        bytes=size_of(folder),
        time=datetime.datetime.fromtimestamp(written_at, datetime.UTC).isoformat(timespec="milliseconds"),
        state="unverified" if not is_verified else "good" if damaged is None else "damaged",
        damage=damaged,
    )
