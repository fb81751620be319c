"""Find runs and describe each for the page: its folder, its environment and its status."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel

from simpletuner.config.paths import fill_placeholders
from simpletuner.config.run import RunConfig
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.removal import finish_deletions
from simpletuner.runs.status import RunStatus, find_runs, is_run, status_of
from simpletuner.server.environments import environments
from simpletuner.server.faults import Fault
from simpletuner.server.roots import Roots

OUTPUT = "output"
"""The folder searched for runs, besides the output_dir of each environment."""
DEPTH = 3
"""Levels of folders below `OUTPUT` that are searched."""

RunName = Annotated[str, Query(max_length=4096)]
"""A run's folder, as in `Run.run`."""

ShownState = Literal["waiting", "starting", "running", "done", "stopped", "failed", "killed"]


class Run(BaseModel):
    """A run's status. Unknown values are null."""

    run: str
    """Its folder, which every route accepts as `run`."""
    name: str
    state: ShownState
    """waiting: never started. starting: its process runs but has written no event yet. killed: its last attempt ended
    without an end event."""
    phase: str | None
    step: int
    """Finished steps."""
    steps: int | None
    """Total steps."""
    saved: int | None
    """Step of its newest checkpoint."""
    loss: float | None
    """Loss of the last step."""
    seconds_per_step: float | None
    started: str | None
    """UTC, ISO 8601, like the other times."""
    updated: str | None
    ended: str | None
    error: str | None
    """The error that ended the last start."""
    pid: int | None
    """The process that holds the run's lock."""
    lora: str | None
    """The finished LoRA, relative to the run's folder."""
    environment: str | None
    """The environment whose output_dir this run is; empty for the unnamed one."""
    note: str
    """The user's note."""


def run_at(roots: Roots, text: str) -> RunDirectory:
    """Return the run in the folder that `text` names.

    Raises:
        Fault: 403, it lies outside the roots; 404, there is no run; 422, it is not a valid path.
    """
    run = RunDirectory(roots.resolve(text))
    # Reading a pipe would block.
    is_pipe = run.events.exists() and not run.events.is_file()
    if is_pipe or not (is_run(run) or run.control.is_dir()):
        raise Fault.of(404, f"{text}: there is no run", "a folder with events.jsonl")
    return run


def path_in_run(roots: Roots, run: RunDirectory, path: Path) -> Path:
    """Return the real path of a file of the run.

    Raises:
        Fault: 403, a link or .. leads outside the run, or it is hidden; 422, it is not a valid path.
    """
    fault = Fault.of(403, f"{path.name} lies outside the run, or is hidden")
    try:
        real = roots.resolve(str(path))
    except Fault as refused:
        raise fault if refused.status == fault.status else refused from None
    if not real.is_relative_to(run.root):
        raise fault
    return real


def list_runs(roots: Roots) -> list[RunDirectory]:
    """List the runs below `output` and those of the environments, each once."""
    below: list[RunDirectory] = []
    with contextlib.suppress(Fault):
        output = roots.resolve(OUTPUT)
        below = [run for run in find_runs(output, DEPTH) if not _is_hidden(run.root.relative_to(output))]
    named = [RunDirectory(path) for path, _ in output_folders(roots)]
    # Both lists hold real paths: `find_runs` follows no links, and the others are resolved.
    return list(dict.fromkeys([*below, *(run for run in named if is_run(run))]))


def _is_hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def output_folders(roots: Roots) -> Iterator[tuple[Path, str]]:
    """Yield each environment's run directory, if it lies below the roots, and the environment's name."""
    default = str(RunConfig.model_fields["output_dir"].default)
    for environment in environments(roots):
        text = environment.values().get("output_dir", default)
        if isinstance(text, str):
            with contextlib.suppress(Fault):
                yield output_folder(roots, text), environment.name


def output_folder(roots: Roots, text: str) -> Path:
    """Return the folder that an output_dir names.

    Raises:
        Fault: it lies outside the roots, is not a valid path, or uses an environment variable, which may be secret.
    """
    try:
        return roots.resolve(fill_placeholders(text, {"model_family": "flux2"}, None))
    except ValueError as error:
        raise Fault.of(422, f"output_dir = {text!r}: {error}") from None


def run_info(roots: Roots, run: RunDirectory, names: dict[Path, str]) -> Run:
    """Return the status of `run`; `names` maps run directories to environments (`output_folders`)."""
    identity: dict[str, Any] = {
        "run": roots.display_path(run.root),
        "name": run.root.name,
        "environment": names.get(run.root),
    }
    try:
        return Run.model_validate(identity | _status_fields(status_of(run)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # Another program wrote these events. One such run must not break the list.
        reason = f"events.jsonl cannot be parsed ({type(error).__name__})"
        empty = dict.fromkeys(Run.model_fields.keys() - identity.keys())
        return Run.model_validate(empty | identity | {"state": "failed", "step": 0, "error": reason, "note": ""})


class _CachedRun:
    """A run of the list, as last read."""

    def __init__(self, run: RunDirectory) -> None:
        self._locks = (run.lock(), run.starting_lock())
        self._files = (run.events, run.starting, run.note, run.finished, run.checkpoints)
        self.mark: object = None
        """Changes whenever `status_of` may return something else."""
        self.started = ""
        self.json = b""

    def current_mark(self, environment: str | None) -> object:
        """Compute the current mark."""
        holders = [lock.pid() or "unknown" if lock.is_held() else None for lock in self._locks]
        return holders, [_stamp(path) for path in self._files], environment


class RunListCache:
    """The run list as JSON. A run is read again only when one of its files or locks changed."""

    def __init__(self) -> None:
        self._cache: dict[RunDirectory, _CachedRun] = {}
        self._is_swept = False

    def listed(self, roots: Roots) -> bytes:
        """Return all runs as a JSON list of `Run`, the most recently started first."""
        if not self._is_swept:
            self._is_swept = True
            with contextlib.suppress(Fault):
                finish_deletions(roots.resolve(OUTPUT), DEPTH)
        names = dict(output_folders(roots))
        old_cache = self._cache
        cache = {run: old_cache.get(run) or _CachedRun(run) for run in list_runs(roots)}
        for run, cached in cache.items():
            mark = cached.current_mark(names.get(run.root))
            if mark != cached.mark:
                answer = run_info(roots, run, names)
                cached.mark, cached.started, cached.json = mark, answer.started or "", answer.model_dump_json().encode()
        self._cache = cache
        newest_first = sorted(cache.values(), key=lambda cached: cached.started, reverse=True)
        return b"[" + b",".join(cached.json for cached in newest_first) + b"]"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _status_fields(status: RunStatus) -> dict[str, Any]:
    values = {name: _sendable(value) for name, value in vars(status).items() if name in Run.model_fields}
    lora = None if status.lora is None else str(status.lora.relative_to(status.root))
    state = "waiting" if status.state == "new" else status.state
    numbers = {"loss": _finite(status.loss), "seconds_per_step": _finite(status.seconds_per_step)}
    return values | numbers | {"state": state, "lora": lora}


def _sendable(value: object) -> object:
    """Replace unpaired surrogates in text: JSON can hold them, UTF-8 cannot. Other values pass unchanged."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
