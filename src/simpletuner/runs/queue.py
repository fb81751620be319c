"""A queue of runs: a folder with one file an entry, and a worker for each set of devices that takes them in turn."""

import contextlib
import datetime
import fcntl
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from simpletuner.base.commandline import command_text
from simpletuner.base.errors import CheckpointError, ConfigError, DiskError, Stopped
from simpletuner.base.files import DirectoryLock, file_errors_reported, read_json, write_json
from simpletuner.config.load import ENVIRONMENT_PREFIX
from simpletuner.runs.launch import reap_later, start_detached
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.starting import printed_since
from simpletuner.runs.status import status_of

QUEUE_FOLDER = Path(".simpletuner") / "queue"
"""Of a queue, below its workspace."""

QueueMove = Literal["up", "down", "top"]

EntryState = Literal["waiting", "running", "done", "stopped", "failed"]

_NAME = re.compile(r"(\d{6,})\.json")
_DEVICES = re.compile(r"[A-Za-z0-9,:_./-]*")
_LOOK_EVERY_S = 1.0
_DISK_FULL_EVERY_S = 30.0


class QueueEntry(BaseModel):
    """One run of the queue."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: int
    """Counts from 1; never given twice."""
    arguments: tuple[str, ...]
    """What was typed after `simpletuner train`."""
    devices: str
    """For CUDA_VISIBLE_DEVICES; "" is what the machine has."""
    output_dir: str
    """The run directory, from the workspace."""
    state: EntryState = "waiting"
    """stopped and failed are the end of it here; the same command goes on with the run."""
    exit_code: int | None = None
    """Once it has ended: 128 and the signal's number where it was killed."""
    pid: int | None = None
    """Of the process that trains, while it is running."""
    added: str = ""
    """UTC, ISO 8601, as the other times."""
    began: str | None = None
    ended: str | None = None
    error: str | None = None
    """Why it failed."""
    command: tuple[str, ...] = ()
    """What follows `simpletuner train` when its turn comes: the arguments, with the configuration kept aside."""


class Queue:
    """The runs that wait, run and have been run in a workspace, oldest first. Any number of processes may use it.

    `folder` is `.simpletuner/queue` in the workspace. Making one writes nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, workspace: Path) -> Self:
        """The queue of a workspace."""
        return cls(workspace / QUEUE_FOLDER)

    @property
    def workspace(self) -> Path:
        """Where its commands run."""
        return self.folder.parent.parent

    def entries(self) -> list[QueueEntry]:
        """Every entry, in the order they are taken; those that began or ended first.

        One whose file is damaged is there as failed. One that was running when the machine or its worker ended, and
        does not run on, is waiting again.
        """
        entries = [self._live(entry) for entry in self._raw()]
        order = self._order()

        def turn(entry: QueueEntry) -> int:
            if entry.state != "waiting":
                return -2
            if entry.id in order:
                return order.index(entry.id)
            # One that was running when they were ordered, and waits again; or one that was added since.
            return -1 if entry.id < max(order, default=0) else len(order)

        return sorted(entries, key=turn)

    def add(
        self,
        arguments: Sequence[str],
        output_dir: str,
        devices: str = "",
        *,
        command: Callable[[Path], Sequence[str]] | None = None,
    ) -> QueueEntry:
        """Put a run at the end. Nothing starts by that: see `work_is_needed`.

        Args:
            arguments: what follows `simpletuner train`.
            command: makes what is run in its turn, given a folder (from the workspace) to keep files in; by default
                the arguments.

        Raises:
            ConfigError: not a list of devices, or the directory is being trained or waits to be.
            DiskError: the disk is full; then there is no entry.
        """
        if not _DEVICES.fullmatch(devices):
            raise ConfigError.of(f"--devices = {devices!r}", "a list such as 0 or 0,1")
        with self._changing():
            self._check_directory(output_dir)
            number = self._new_number()
            aside = self._aside(number)
            try:
                own = aside.relative_to(self.workspace)
                run = tuple(arguments) if command is None else tuple(command(own))
                entry = QueueEntry(
                    id=number,
                    arguments=tuple(arguments),
                    devices=devices,
                    output_dir=output_dir,
                    added=_now(),
                    command=run,
                )
                self.write(entry)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        return entry

    def remove(self, number: int) -> QueueEntry:
        """Take an entry out, whether it waits or has ended; returns it. What it trained stays.

        Raises:
            ConfigError: no such entry, or it is running.
        """
        with self._changing():
            found = self._parsed(number)
            if found is None:
                raise ConfigError.of(f"queue entry {number}: there is none", self._known())
            entry = self._live(found)
            if entry.state == "running":
                raise ConfigError.of(
                    f"queue entry {number} is running",
                    "one that waits or has ended",
                    f"`{command_text('simpletuner', 'run', 'stop', entry.output_dir)}` saves and ends it.",
                )
            self._path(number).unlink(missing_ok=True)
            self.held(number).path.unlink(missing_ok=True)
            shutil.rmtree(self._aside(number), ignore_errors=True)
        return entry

    def move(self, number: int, to: QueueMove | int) -> QueueEntry:
        """Change the turn of an entry that waits: one place up or down, to the top, or to a place counted from 1.

        Raises:
            ConfigError: no such entry, or it does not wait.
        """
        with self._changing():
            waiting = [entry.id for entry in self.entries() if entry.state == "waiting"]
            if number not in waiting:
                entry = self._parsed(number)
                found = "there is none" if entry is None else f"it is {self._live(entry).state}"
                expected = f"one that waits: {', '.join(map(str, waiting))}" if waiting else "one that waits"
                raise ConfigError.of(f"queue entry {number}: {found}", expected)
            place = waiting.index(number)
            steps = {"up": place - 1, "down": place + 1, "top": 0}
            wanted = steps[to] if isinstance(to, str) else to - 1
            waiting.insert(max(0, wanted), waiting.pop(place))
            write_json(self._order_file, waiting)
            found_entry = self._parsed(number)
            assert found_entry is not None
        return found_entry

    def next(self, devices: str) -> QueueEntry | None:
        """The entry whose turn it is on these devices."""
        return next((e for e in self.entries() if e.state == "waiting" and e.devices == devices), None)

    def worker(self, devices: str) -> DirectoryLock:
        """Held by the worker for these devices."""
        return DirectoryLock(self.folder / f"worker-{_file_name(devices)}.lock")

    def work_is_needed(self) -> list[str]:
        """The devices that entries wait for and no worker works for."""
        with self._changing():
            waiting = dict.fromkeys(e.devices for e in self.entries() if e.state == "waiting")
            return [devices for devices in waiting if not self.worker(devices).is_held()]

    def start_workers(self, wait_s: float = 10.0) -> list[str]:
        """Start the workers that are needed, each on its own; returns their devices.

        Raises:
            DiskError: the disk is full.
        """
        needed = self.work_is_needed()
        for devices in needed:
            log = self.worker_log(devices)
            with file_errors_reported(log), log.open("ab") as output:
                reap_later(
                    start_detached(["run", "queue", "work", f"--devices={devices}"], self.workspace, output, devices)
                )
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and not all(self._is_taken_up(devices) for devices in needed):
            time.sleep(0.05)
        return needed

    def worker_log(self, devices: str) -> Path:
        """What that worker says."""
        return self.folder / f"worker-{_file_name(devices)}.log"

    def work(self, devices: str, say: Callable[[str], None]) -> None:
        """Run what waits for these devices, one after the other, until nothing does. Returns at once where another
        worker does so.

        A run that is stopped or fails is followed by the next. One that fails for want of disk space, as all after it
        would, ends the work.

        Raises:
            DiskError: a run found the disk full; the others still wait.
        """
        lock = contextlib.ExitStack()
        try:
            lock.enter_context(self.worker(devices))
        except CheckpointError:
            return
        with lock:
            self._await_orphans(devices, say)
            while True:
                with self._changing():
                    entry = self.next(devices)
                    if entry is None:
                        # Let go while nothing can be added: what comes after finds no worker and starts one.
                        lock.close()
                        return
                    try:
                        turn = _Turn(self, entry)
                    except ConfigError as error:
                        self.write(_ended(entry, error.exit_code, str(error)))
                        continue
                say(f"{entry.id}: {entry.output_dir} begins")
                ended = turn.wait()
                self._write_patiently(ended, say)
                say(f"{entry.id}: {entry.output_dir} {ended.state}, exit code {ended.exit_code}")
                if ended.exit_code == DiskError.exit_code:
                    raise DiskError.of(
                        f"queue entry {entry.id} found the disk full; what comes after it still waits",
                        remedy="Free some space, then `simpletuner run queue resume`.",
                    )

    def _is_taken_up(self, devices: str) -> bool:
        return self.worker(devices).is_held() or self.next(devices) is None

    def _await_orphans(self, devices: str, say: Callable[[str], None]) -> None:
        """Wait for runs that go on although their worker ended; put what does not go on back into the queue."""
        for entry in [e for e in self._raw() if e.state == "running" and e.devices == devices]:
            if self.held(entry.id).is_held():
                say(f"{entry.id}: {entry.output_dir} goes on without its worker; waiting for it")
            while self.held(entry.id).is_held():
                time.sleep(_LOOK_EVERY_S)
            status = status_of(RunDirectory(self.workspace / entry.output_dir))
            if status.exit_code is not None and (status.ended or "") >= (entry.began or ""):
                self._write_patiently(_ended(entry, status.exit_code, status.error), say)
            else:
                say(f"{entry.id}: {entry.output_dir} broke off; it waits again")
                self._write_patiently(_waiting(entry), say)

    def _check_directory(self, output_dir: str) -> None:
        place = (self.workspace / output_dir).resolve()
        for entry in self.entries():
            if entry.state in ("waiting", "running") and (self.workspace / entry.output_dir).resolve() == place:
                raise ConfigError.of(
                    f"output_dir = {output_dir} is that of queue entry {entry.id}, which is {entry.state}",
                    "a directory of its own",
                    "Give another --output_dir.",
                )
        run = RunDirectory(place)
        if run.lock().is_held():
            raise ConfigError.of(
                f"output_dir = {output_dir} is being trained by process {run.lock().pid() or 'unknown'}",
                "a directory of its own",
                "Give another --output_dir, or wait.",
            )

    @property
    def _order_file(self) -> Path:
        """The entries that waited when they were last ordered by hand."""
        return self.folder / "order"

    def _order(self) -> list[int]:
        try:
            return [number for number in read_json(self._order_file) if isinstance(number, int)]
        except (OSError, ValueError, TypeError):
            return []

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def _aside(self, number: int) -> Path:
        """Where an entry's own files lie."""
        return self.folder / f"{number:06d}"

    def held(self, number: int) -> DirectoryLock:
        """Held by the process that trains, from before its first line to its end."""
        return DirectoryLock(self.folder / f"{number:06d}.lock")

    def _known(self) -> str:
        numbers = [str(entry.id) for entry in self.entries()]
        return f"one of {', '.join(numbers)}" if numbers else ""

    def _raw(self) -> list[QueueEntry]:
        """As the files have them."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("*.json"))
        numbers = sorted(int(name[1]) for name in names if name)
        return [entry for entry in map(self._parsed, numbers) if entry is not None]

    def _live(self, entry: QueueEntry) -> QueueEntry:
        """The entry as it stands now, whatever its file remembers."""
        if entry.state != "running" or self.held(entry.id).is_held() or self.worker(entry.devices).is_held():
            return entry
        return _waiting(entry)

    def _parsed(self, number: int) -> QueueEntry | None:
        """The entry, one that says what is wrong with its file, or None where there is none."""
        path = self._path(number)
        try:
            return QueueEntry.model_validate(read_json(path) | {"id": number})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, OSError) as error:
            why = f"{path.name} cannot be read ({type(error).__name__}). Remove the entry and add it again."
            return QueueEntry(id=number, arguments=(), devices="", output_dir="", state="failed", error=why)

    def write(self, entry: QueueEntry) -> None:
        """Replace an entry's file.

        Raises:
            DiskError: the disk is full; the file is as it was.
        """
        write_json(self._path(entry.id), entry.model_dump(mode="json"))

    def _write_patiently(self, entry: QueueEntry, say: Callable[[str], None]) -> None:
        """Write where a full disk must not lose what happened: again and again, until there is room."""
        while True:
            try:
                with self._changing():
                    self.write(entry)
                    return self.held(entry.id).path.unlink(missing_ok=True)
            except DiskError as error:
                with contextlib.suppress(OSError):
                    say(f"{entry.id}: {error}")
                time.sleep(_DISK_FULL_EVERY_S)

    def _new_number(self) -> int:
        """Above every number that was ever given, so that one never means another entry."""
        path = self.folder / "last"
        with contextlib.suppress(FileNotFoundError, ValueError):
            last = int(path.read_text(encoding="ascii"))
            return self._given(max([last, *(e.id for e in self._raw())]) + 1)
        return self._given(max([0, *(e.id for e in self._raw())]) + 1)

    def _given(self, number: int) -> int:
        write_json(self.folder / "last", number)
        return number

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """One process at a time changes entries, for an instant each."""
        with file_errors_reported(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self.folder / "changing.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _file_name(devices: str) -> str:
    return re.sub(r"[^A-Za-z0-9,-]", "_", devices) or "all"


def _waiting(entry: QueueEntry) -> QueueEntry:
    return entry.model_copy(update={"state": "waiting", "pid": None, "began": None})


def _ended(entry: QueueEntry, exit_code: int, error: str | None) -> QueueEntry:
    states: dict[int, EntryState] = {0: "done", Stopped.exit_code: "stopped"}
    state = states.get(exit_code, "failed")
    update = {"state": state, "exit_code": exit_code, "pid": None, "ended": _now()}
    return entry.model_copy(update=update | {"error": error if state == "failed" else None})


class _Turn:
    """An entry whose turn it is, and the process that trains it."""

    def __init__(self, queue: Queue, entry: QueueEntry) -> None:
        self.queue = queue
        self.run = RunDirectory(queue.workspace / entry.output_dir)
        self.run.create()
        self.entry = entry.model_copy(update={"state": "running", "began": _now(), "ended": None, "error": None})
        queue.write(self.entry)
        # The process keeps this file locked to its end, from before its first line: no pid can tell as surely.
        held = os.open(queue.held(entry.id).path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            with file_errors_reported(self.run.console), self.run.console.open("ab") as console:
                self._printed = console.tell()
                environ = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
                command = ["train", *(entry.command or entry.arguments)]
                self._process = start_detached(
                    command, queue.workspace, console, entry.devices, environ=environ, handles=(held,)
                )
        finally:
            os.close(held)
        self.entry = self.entry.model_copy(update={"pid": self._process.pid})
        with contextlib.suppress(DiskError):  # it trains, with or without its number there
            queue.write(self.entry)

    def wait(self) -> QueueEntry:
        """To its end; the entry with what came of it."""
        code = self._process.wait()
        status = status_of(self.run)
        is_told = status.updated is not None and status.updated >= (self.entry.began or "")
        said = status.error if is_told else None
        if code < 0:
            why = "Put it in the queue again to go on from its last checkpoint."
            return _ended(self.entry, 128 - code, f"ended by signal {-code} ({signal.strsignal(-code)}). {why}")
        return _ended(self.entry, code, said or printed_since(self.run.console, self._printed) or f"exit code {code}")
