"""Runs as the page knows them: where they are found, what one is called, where it stands."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel

from simpletuner.config.paths import filled
from simpletuner.config.run import RunConfig
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.removal import finish_deletions
from simpletuner.runs.status import RunStatus, find_runs, is_run, status_of
from simpletuner.server.environments import environments
from simpletuner.server.faults import Fault
from simpletuner.server.roots import Roots

OUTPUT = "output"
"""Where runs are looked for, besides what environments name."""
DEPTH = 3

RunName = Annotated[str, Query(max_length=4096)]
"""A run's folder, as `Run.run` has it."""

GlanceState = Literal["waiting", "starting", "running", "done", "stopped", "failed", "killed"]


class Run(BaseModel):
    """A run at a glance. What is not known (yet) is null."""

    run: str
    """Its folder: what every route takes as `run`."""
    name: str
    state: GlanceState
    """waiting: nothing has happened yet. starting: its process is being loaded. killed: its last attempt broke off
    without a word."""
    phase: str | None
    step: int
    """Steps that are finished."""
    steps: int | None
    """Steps in all."""
    saved: int | None
    """Step of its newest checkpoint."""
    loss: float | None
    """Of the last step."""
    seconds_per_step: float | None
    started: str | None
    """UTC, ISO 8601, as the other times."""
    updated: str | None
    ended: str | None
    error: str | None
    """What the last start ended with."""
    pid: int | None
    """Process that holds it."""
    lora: str | None
    """The finished LoRA, from the run's folder."""
    environment: str | None
    """The environment whose output_dir it is; empty for the one without a name."""
    note: str
    """The user's own words about it."""


def run_at(roots: Roots, text: str) -> RunDirectory:
    """The run in the folder that `text` names.

    Raises:
        Fault: 403, it lies outside the roots; 404, no run is there; 422, it is no path.
    """
    run = RunDirectory(roots.resolve(text))
    # Reading a pipe would wait for whoever writes to it.
    is_pipe = run.events.exists() and not run.events.is_file()
    if is_pipe or not (is_run(run) or run.control.is_dir()):
        raise Fault.of(404, f"{text}: no run is there", "a folder with events.jsonl")
    return run


def part_of(roots: Roots, run: RunDirectory, path: Path) -> Path:
    """The real path of a file of the run.

    Raises:
        Fault: 403, a link or .. leads out of the run, or it is hidden; 422, it is no path.
    """
    fault = Fault.of(403, f"{path.name} lies outside the run, or is hidden")
    try:
        real = roots.resolve(str(path))
    except Fault as refused:
        raise fault if refused.status == fault.status else refused from None
    if not real.is_relative_to(run.root):
        raise fault
    return real


def found_runs(roots: Roots) -> list[RunDirectory]:
    """The runs below `output` and those of the environments, each once."""
    below: list[RunDirectory] = []
    with contextlib.suppress(Fault):
        output = roots.resolve(OUTPUT)
        below = [run for run in find_runs(output, DEPTH) if not _is_hidden(run.root.relative_to(output))]
    named = [RunDirectory(path) for path, _ in output_folders(roots)]
    # No link leads to those below a real folder; the others are resolved.
    return list(dict.fromkeys([*below, *(run for run in named if is_run(run))]))


def _is_hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def output_folders(roots: Roots) -> Iterator[tuple[Path, str]]:
    """The run directory of each environment, as far as it lies below the roots, and the environment's name."""
    default = str(RunConfig.model_fields["output_dir"].default)
    for environment in environments(roots):
        text = environment.values().get("output_dir", default)
        if isinstance(text, str):
            with contextlib.suppress(Fault):
                yield output_folder(roots, text), environment.name


def output_folder(roots: Roots, text: str) -> Path:
    """The folder that an output_dir stands for.

    Raises:
        Fault: it lies outside the roots, is no path, or takes a variable of the environment: those may be secret.
    """
    try:
        return roots.resolve(filled(text, {"model_family": "flux2"}, None))
    except ValueError as error:
        raise Fault.of(422, f"output_dir = {text!r}: {error}") from None


def glance(roots: Roots, run: RunDirectory, names: dict[Path, str]) -> Run:
    """Where `run` stands; `names` are the environments by their run directory (`output_folders`)."""
    told: dict[str, Any] = {
        "run": roots.shown(run.root),
        "name": run.root.name,
        "environment": names.get(run.root),
    }
    try:
        return Run.model_validate(told | _standing(status_of(run)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # Its events say what no run of ours says. The list of runs must not end with it.
        reason = f"events.jsonl cannot be understood ({type(error).__name__})"
        empty = dict.fromkeys(Run.model_fields.keys() - told.keys())
        return Run.model_validate(empty | told | {"state": "failed", "step": 0, "error": reason, "note": ""})


class _Known:
    """A run of the list, as it was read last."""

    def __init__(self, run: RunDirectory) -> None:
        self._locks = (run.lock(), run.starting_lock())
        self._files = (run.events, run.starting, run.note, run.finished, run.checkpoints)
        self.mark: object = None
        """What changes whenever `status_of` may say something else."""
        self.started = ""
        self.json = b""

    def look(self, environment: str | None) -> object:
        """The mark as it is now."""
        holders = [lock.pid() or "unknown" if lock.is_held() else None for lock in self._locks]
        return holders, [_stamp(path) for path in self._files], environment


class Glances:
    """The runs of the list as JSON. A run is read again only where a file or a lock of it changed."""

    def __init__(self) -> None:
        self._known: dict[RunDirectory, _Known] = {}
        self._is_swept = False

    def listed(self, roots: Roots) -> bytes:
        """All runs, the one that was started last first: a JSON list of `Run`."""
        if not self._is_swept:
            self._is_swept = True
            with contextlib.suppress(Fault):
                finish_deletions(roots.resolve(OUTPUT), DEPTH)
        names = dict(output_folders(roots))
        before = self._known
        known = {run: before.get(run) or _Known(run) for run in found_runs(roots)}
        for run, one in known.items():
            mark = one.look(names.get(run.root))
            if mark != one.mark:
                found = glance(roots, run, names)
                one.mark, one.started, one.json = mark, found.started or "", found.model_dump_json().encode()
        self._known = known
        newest = sorted(known.values(), key=lambda one: one.started, reverse=True)
        return b"[" + b",".join(one.json for one in newest) + b"]"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _standing(status: RunStatus) -> dict[str, Any]:
    values = {name: _sendable(value) for name, value in vars(status).items() if name in Run.model_fields}
    lora = None if status.lora is None else str(status.lora.relative_to(status.root))
    state = "waiting" if status.state == "new" else status.state
    numbers = {"loss": _finite(status.loss), "seconds_per_step": _finite(status.seconds_per_step)}
    return values | numbers | {"state": state, "lora": lora}


def _sendable(value: object) -> object:
    """A text without halves of surrogate pairs, which JSON may hold and UTF-8 may not; anything else as it is."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
