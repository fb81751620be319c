"""A queue of runs: a folder with one file per entry, and one worker per list of devices that runs entries in order."""

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
"""Folder of a queue, in its workspace."""

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
    """Unique number, counted from 1."""
    arguments: tuple[str, ...]
    """The arguments of `simpletuner train` as typed."""
    devices: str
    """Value of CUDA_VISIBLE_DEVICES; "" means all devices of the machine."""
    output_dir: str
    """The run directory, relative to the workspace."""
    state: EntryState = "waiting"
    """State of the entry. The queue does not run a stopped or failed entry again; the same command resumes its run."""
    exit_code: int | None = None
    """Exit code once it has ended; 128 plus the signal's number if it was killed."""
    pid: int | None = None
    """Id of the training process while it runs."""
    added: str = ""
    """UTC, ISO 8601, like the other times."""
    began: str | None = None
    ended: str | None = None
    error: str | None = None
    """The error of a failed run."""
    command: tuple[str, ...] = ()
    """The arguments with which `simpletuner train` is started: as typed, but with a copy of the configuration."""


class Queue:
    """The waiting, running and finished runs of a workspace, oldest first. Any number of processes may use it.

    `folder` is `.simpletuner/queue` in the workspace. Creating the object writes nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, workspace: Path) -> Self:
        """The queue of a workspace."""
        return cls(workspace / QUEUE_FOLDER)

    @property
    def workspace(self) -> Path:
        """Working directory of its commands."""
        return self.folder.parent.parent

    def entries(self) -> list[QueueEntry]:
        """All entries: first those that have begun or ended, then the waiting ones in the order of execution.

        An entry with a damaged file is failed. A running entry whose worker and process no longer exist is waiting
        again.
        """
        entries = [self._current(entry) for entry in self._stored_entries()]
        order = self._order()

        def position(entry: QueueEntry) -> int:
            if entry.state != "waiting":
                return -2
            if entry.id in order:
                return order.index(entry.id)
            # It was running when the others were ordered and waits again, or it was added later.
            return -1 if entry.id < max(order, default=0) else len(order)

        return sorted(entries, key=position)

    def add(
        self,
        arguments: Sequence[str],
        output_dir: str,
        devices: str = "",
        *,
        command: Callable[[Path], Sequence[str]] | None = None,
    ) -> QueueEntry:
        """Add a run at the end of the queue. This does not start it: see `work_is_needed`.

        Args:
            arguments: the arguments of `simpletuner train`.
            command: returns the arguments to start the run with, given a folder (relative to the workspace) for files
                of the entry; by default `arguments`.

        Raises:
            ConfigError: `devices` is not a list of devices, or the directory is in use or belongs to another entry.
            DiskError: the disk is full; no entry is added.
        """
        if not _DEVICES.fullmatch(devices):
            raise ConfigError.of(f"--devices = {devices!r}", "a list such as 0 or 0,1")
        with self._changing():
            self._check_directory(output_dir)
            number = self._new_number()
            folder = self._entry_folder(number)
            try:
                relative = folder.relative_to(self.workspace)
                run = tuple(arguments) if command is None else tuple(command(relative))
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
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return entry

    def remove(self, number: int) -> QueueEntry:
        """Remove an entry that waits or has ended, and return it. Its run directory is kept.

        Raises:
            ConfigError: there is no such entry, or it is running.
        """
        with self._changing():
            stored = self._parsed(number)
            if stored is None:
                raise ConfigError.of(f"queue entry {number}: there is none", self._expected_numbers())
            entry = self._current(stored)
            if entry.state == "running":
                raise ConfigError.of(
                    f"queue entry {number} is running",
                    "an entry that waits or has ended",
                    f"`{command_text('simpletuner', 'run', 'stop', entry.output_dir)}` saves and stops it.",
                )
            self._path(number).unlink(missing_ok=True)
            self.process_lock(number).path.unlink(missing_ok=True)
            shutil.rmtree(self._entry_folder(number), ignore_errors=True)
        return entry

    def move(self, number: int, to: QueueMove | int) -> QueueEntry:
        """Move a waiting entry: one position up or down, to the top, or to a position counted from 1.

        Raises:
            ConfigError: there is no such entry, or it does not wait.
        """
        with self._changing():
            waiting = [entry.id for entry in self.entries() if entry.state == "waiting"]
            if number not in waiting:
                entry = self._parsed(number)
                finding = "there is none" if entry is None else f"it is {self._current(entry).state}"
                expected = f"a waiting entry: {', '.join(map(str, waiting))}" if waiting else "a waiting entry"
                raise ConfigError.of(f"queue entry {number}: {finding}", expected)
            index = waiting.index(number)
            steps = {"up": index - 1, "down": index + 1, "top": 0}
            target = steps[to] if isinstance(to, str) else to - 1
            waiting.insert(max(0, target), waiting.pop(index))
            write_json(self._order_file, waiting)
            stored = self._parsed(number)
            assert stored is not None
        return stored

    def next(self, devices: str) -> QueueEntry | None:
        """The first waiting entry for these devices."""
        return next((e for e in self.entries() if e.state == "waiting" and e.devices == devices), None)

    def worker(self, devices: str) -> DirectoryLock:
        """Lock held by the worker for these devices."""
        return DirectoryLock(self.folder / f"worker-{_file_name(devices)}.lock")

    def work_is_needed(self) -> list[str]:
        """Devices of waiting entries for which no worker runs."""
        with self._changing():
            waiting = dict.fromkeys(e.devices for e in self.entries() if e.state == "waiting")
            return [devices for devices in waiting if not self.worker(devices).is_held()]

    def start_workers(self, wait_s: float = 10.0) -> list[str]:
        """Start the missing workers as detached processes. Returns their devices.

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
        """Output of the worker for these devices."""
        return self.folder / f"worker-{_file_name(devices)}.log"

    def work(self, devices: str, say: Callable[[str], None]) -> None:
        """Run the waiting entries for these devices, one after the other, until none waits. Returns at once if another
        worker runs.

        After a stopped or failed run, the next one begins. A run that fails because the disk is full ends the work,
        since the next runs would fail too.

        Raises:
            DiskError: a run failed because the disk is full; the other entries still wait.
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
                        # Release the lock while no entry can be added: whoever adds the next one starts a worker.
                        lock.close()
                        return
                    try:
                        process = _EntryProcess(self, entry)
                    except ConfigError as error:
                        self.write(_ended(entry, error.exit_code, str(error)))
                        continue
                say(f"{entry.id}: {entry.output_dir} begins")
                ended = process.wait()
                self._write_patiently(ended, say)
                say(f"{entry.id}: {entry.output_dir} {ended.state}, exit code {ended.exit_code}")
                if ended.exit_code == DiskError.exit_code:
                    raise DiskError.of(
                        f"queue entry {entry.id} failed because the disk is full; the entries after it still wait",
                        remedy="Free some space, then `simpletuner run queue resume`.",
                    )

    def _is_taken_up(self, devices: str) -> bool:
        return self.worker(devices).is_held() or self.next(devices) is None

    def _await_orphans(self, devices: str, say: Callable[[str], None]) -> None:
        """Wait for runs that outlived their worker. Put entries whose process was killed back into the queue."""
        for entry in [e for e in self._stored_entries() if e.state == "running" and e.devices == devices]:
            if self.process_lock(entry.id).is_held():
                say(f"{entry.id}: {entry.output_dir} still runs without its worker; waiting for it")
            while self.process_lock(entry.id).is_held():
                time.sleep(_LOOK_EVERY_S)
            status = status_of(RunDirectory(self.workspace / entry.output_dir))
            if status.exit_code is not None and (status.ended or "") >= (entry.began or ""):
                self._write_patiently(_ended(entry, status.exit_code, status.error), say)
            else:
                say(f"{entry.id}: {entry.output_dir} was interrupted; it waits again")
                self._write_patiently(_waiting(entry), say)

    def _check_directory(self, output_dir: str) -> None:
        directory = (self.workspace / output_dir).resolve()
        for entry in self.entries():
            if entry.state in ("waiting", "running") and (self.workspace / entry.output_dir).resolve() == directory:
                raise ConfigError.of(
                    f"output_dir = {output_dir} belongs to queue entry {entry.id}, which is {entry.state}",
                    "a separate directory",
                    "Give another --output_dir.",
                )
        run = RunDirectory(directory)
        if run.lock().is_held():
            raise ConfigError.of(
                f"output_dir = {output_dir} is in use by process {run.lock().pid() or 'unknown'}",
                "a separate directory",
                "Give another --output_dir, or wait.",
            )

    @property
    def _order_file(self) -> Path:
        """File with the waiting entries in the order that the user last chose."""
        return self.folder / "order"

    def _order(self) -> list[int]:
        try:
            return [number for number in read_json(self._order_file) if isinstance(number, int)]
        except (OSError, ValueError, TypeError):
            return []

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def _entry_folder(self, number: int) -> Path:
        """Folder for the files of an entry, such as its configuration."""
        return self.folder / f"{number:06d}"

    def process_lock(self, number: int) -> DirectoryLock:
        """Lock held by an entry's training process, from before its first line to its end."""
        return DirectoryLock(self.folder / f"{number:06d}.lock")

    def _expected_numbers(self) -> str:
        numbers = [str(entry.id) for entry in self.entries()]
        return f"one of {', '.join(numbers)}" if numbers else ""

    def _stored_entries(self) -> list[QueueEntry]:
        """The entries as their files contain them."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("*.json"))
        numbers = sorted(int(name[1]) for name in names if name)
        return [entry for entry in map(self._parsed, numbers) if entry is not None]

    def _current(self, entry: QueueEntry) -> QueueEntry:
        """The entry with its current state: a running entry without worker and process waits again."""
        if entry.state != "running" or self.process_lock(entry.id).is_held() or self.worker(entry.devices).is_held():
            return entry
        return _waiting(entry)

    def _parsed(self, number: int) -> QueueEntry | None:
        """The stored entry; a failed entry with the error if its file is damaged; None if there is no file."""
        path = self._path(number)
        try:
            return QueueEntry.model_validate(read_json(path) | {"id": number})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, OSError) as error:
            reason = f"{path.name} cannot be read ({type(error).__name__}). Remove the entry and add it again."
            return QueueEntry(id=number, arguments=(), devices="", output_dir="", state="failed", error=reason)

    def write(self, entry: QueueEntry) -> None:
        """Replace an entry's file.

        Raises:
            DiskError: the disk is full; the file is unchanged.
        """
        write_json(self._path(entry.id), entry.model_dump(mode="json"))

    def _write_patiently(self, entry: QueueEntry, say: Callable[[str], None]) -> None:
        """Write an entry, and repeat while the disk is full, so that its result is not lost."""
        while True:
            try:
                with self._changing():
                    self.write(entry)
                    return self.process_lock(entry.id).path.unlink(missing_ok=True)
            except DiskError as error:
                with contextlib.suppress(OSError):
                    say(f"{entry.id}: {error}")
                time.sleep(_DISK_FULL_EVERY_S)

    def _new_number(self) -> int:
        """A number above all earlier ones, so that a number never refers to two entries."""
        path, last = self.folder / "last", 0
        with contextlib.suppress(FileNotFoundError, ValueError):
            last = int(path.read_text(encoding="ascii"))
        number = max([last, *(entry.id for entry in self._stored_entries())]) + 1
        write_json(path, number)
        return number

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Lock the queue for a short change of its entries."""
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


class _EntryProcess:
    """A running entry and its training process."""

    def __init__(self, queue: Queue, entry: QueueEntry) -> None:
        self.queue = queue
        self.run = RunDirectory(queue.workspace / entry.output_dir)
        self.run.create()
        self.entry = entry.model_copy(update={"state": "running", "began": _now(), "ended": None, "error": None})
        queue.write(self.entry)
        # The process inherits this lock and holds it to its end. Unlike a pid, it cannot belong to another process.
        lock_file = os.open(queue.process_lock(entry.id).path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX)
            with file_errors_reported(self.run.console), self.run.console.open("ab") as console:
                self._printed = console.tell()
                environ = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
                command = ["train", *(entry.command or entry.arguments)]
                self._process = start_detached(
                    command, queue.workspace, console, entry.devices, environ=environ, handles=(lock_file,)
                )
        finally:
            os.close(lock_file)
        self.entry = self.entry.model_copy(update={"pid": self._process.pid})
        with contextlib.suppress(DiskError):  # it trains even if its pid cannot be recorded
            queue.write(self.entry)

    def wait(self) -> QueueEntry:
        """Wait for the process to end. Returns the entry with its result."""
        code = self._process.wait()
        status = status_of(self.run)
        has_events = status.updated is not None and status.updated >= (self.entry.began or "")
        event_error = status.error if has_events else None
        if code < 0:
            remedy = "Add it to the queue again to resume from its last checkpoint."
            return _ended(self.entry, 128 - code, f"ended by signal {-code} ({signal.strsignal(-code)}). {remedy}")
        return _ended(
            self.entry, code, event_error or printed_since(self.run.console, self._printed) or f"exit code {code}"
        )
