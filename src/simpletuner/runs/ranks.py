"""The processes of one run: a supervisor starts the ranks, forwards signals, and reports the rank that failed first.

Rank 0 uses the terminal and writes the run's files. The supervisor keeps the output of the other ranks and prints it
if it explains an error. The ranks share a private folder, into which each writes the error that ended it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel, ConfigDict

from simpletuner.base.console import complain
from simpletuner.base.errors import ConfigError, DiskError, Problem, RanksError, UserError, error_class
from simpletuner.base.files import file_problem, write_atomic
from simpletuner.base.signals import (
    EXIT_SIGNALS,
    REPEAT_S,
    STOP_FROM_OTHER_MACHINE,
    STOPPED,
    WARNING_SIGNALS,
    deferred_signals,
)
from simpletuner.runs.events import EndEvent, ErrorEvent, EventLog
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.machines import MachineLink, Machines
from simpletuner.runs.status import status_of

RANKS_FOLDER = "RANKS_FOLDER"
"""Environment variable: the private folder that the processes of a run share."""
RANKS_LIFELINE = "RANKS_LIFELINE"
"""Environment variable: the file descriptor of a pipe that closes when the supervisor ends."""
RANKS_LISTENER = "RANKS_LISTENER"
"""Environment variable of rank 0 on several machines: the file descriptor on which its store listens."""
RANKS_NOTICE = "RANKS_NOTICE"
"""Environment variable: the supervisor's notice for the run's events; not set without one."""
GRACE_S = 15.0
"""Seconds that rank 0 has to fail by itself and write its events, after another rank has failed."""
REST_S = 2.0
"""Seconds that the other ranks have to end after rank 0 has ended: they have nothing left to write."""
LEAVE_S = 5.0
"""Seconds that rank 0 has to react to a second Ctrl-C before all ranks are killed."""
BLAME_PATIENCE_S = 3.0
"""Seconds that a rank whose collective failed waits for the error of the rank that caused it."""
LOOK_AT_RANKS_EVERY_S = 0.05
RANK_TAIL_BYTES = 16 * 1024
"""How many bytes from the end of a rank's output are kept."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_DIST_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
"""Names of torch's error classes, all RuntimeErrors. Names, because this module does not import torch."""
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class RankPlace:
    """Rank, world size and machine of this process, from its environment."""

    rank: int
    size: int
    local_rank: int
    """Rank on this machine: the GPU that the process uses."""
    local_size: int
    """Number of processes on each machine."""
    folder: Path | None = None
    """Private folder of our own supervisor's ranks; None under torchrun."""
    lifeline: int | None = None
    """File descriptor of a pipe that closes when the supervisor ends; None under torchrun."""

    @property
    def machine(self) -> int:
        return self.rank // self.local_size

    @property
    def machines(self) -> int:
        return self.size // self.local_size

    @property
    def errors(self) -> "ErrorFiles | None":
        """The error files of our own supervisor's ranks; None under torchrun."""
        return None if self.folder is None else ErrorFiles(self.rank, self.size, self.folder)


def read_rank_place(environ: Mapping[str, str]) -> RankPlace | None:
    """The rank of this process among those that our supervisor or torchrun started; None for a single process.

    Raises:
        ConfigError: the environment is incomplete or contradicts itself.
    """
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    ranks_folder = environ.get(RANKS_FOLDER)
    needed = ("RANK", "WORLD_SIZE") if environ.get("WORLD_SIZE") == "1" else _NUMBERS if ranks_folder else _TORCHRUN
    remedy = f"Start with torchrun, which sets all of {', '.join(_TORCHRUN)}, or unset RANK and WORLD_SIZE."
    problems = [Problem(f"{name} is not set, though RANK or WORLD_SIZE is") for name in needed if name not in environ]
    texts = {name: environ[name] for name in (*_NUMBERS, "MASTER_PORT") if name in needed and name in environ}
    numbers = {name: int(text) for name, text in texts.items() if text.isascii() and text.isdecimal()}
    problems += [
        Problem(f"{name}={text} in the environment", "a whole number from 0")
        for name, text in texts.items()
        if name not in numbers
    ]
    rank, size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    if not problems and rank >= size:
        problems.append(Problem(f"RANK={rank} in the environment", f"a number below WORLD_SIZE, {size}"))
    if problems:
        raise ConfigError(*problems[:-1], Problem(problems[-1].found, problems[-1].expected, remedy))
    if size == 1:
        return None
    local_rank, local_size = numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"]
    # On one machine, a launcher may let each process see a single GPU, which then has number 0.
    if not local_size or size % local_size or (size > local_size and rank % local_size != local_rank):
        raise ConfigError.of(
            f"RANK={rank} with WORLD_SIZE={size}, LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_size}",
            "the same number of processes on each machine, numbered machine by machine",
            "Start torchrun on each machine with the same --nproc-per-node.",
        )
    lifeline = environ.get(RANKS_LIFELINE)
    return RankPlace(
        rank,
        size,
        local_rank,
        local_size,
        Path(ranks_folder) if ranks_folder else None,
        int(lifeline) if ranks_folder and lifeline else None,
    )


class RankFailure(BaseModel):
    """The error that ended a rank, as sent to the other ranks."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    rank: int
    exit_code: int
    text: str
    time: float
    """Seconds since the epoch."""
    is_echo: bool = False
    """Whether another rank's error caused it: a collective that failed."""

    @property
    def named(self) -> str:
        """The text, with the rank's name in front."""
        return self.text if self.text.startswith(f"rank {self.rank} ") else f"rank {self.rank}: {self.text}"

    def error(self) -> UserError:
        """The failure as an error of its class."""
        return error_class(self.exit_code).of(self.named)


@dataclass(frozen=True)
class RankErrors(ABC):
    """Exchange of errors among ranks."""

    rank: int
    size: int

    @abstractmethod
    def write(self, failure: RankFailure) -> None:
        """Report a failure to the other ranks. A failed write is ignored, so that it does not hide the error."""

    @abstractmethod
    def read(self) -> dict[int, RankFailure]:
        """The failures reported so far, by rank."""

    def first(self) -> RankFailure | None:
        """The earliest failure that no other failure caused."""
        causes = [failure for failure in self.read().values() if not failure.is_echo]
        return min(causes, key=lambda failure: failure.time, default=None)

    def check(self) -> None:
        """Raise if another rank has failed.

        Raises:
            UserError: the other rank's error, with its name and its class.
        """
        failed = self.first()
        if failed is not None and failed.rank != self.rank:
            raise self._echoed(failed)

    @contextlib.contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Report errors inside the context to the other ranks. If another rank's error broke a collective, raise that
        error instead.

        Raises:
            UserError: another rank's error in place of the RanksError that it caused.
        """
        try:
            yield
        except RanksError as error:
            if self.rank in self.read():  # raised by `check`, or reported by an inner context
                raise
            raise self._cause(error) from error
        except BaseException as error:
            if _is_broken_collective(error):
                broken = RanksError.of(f"another process is gone or does not answer ({_last_line(error)})")
                raise self._cause(broken) from error
            if self.rank not in self.read():
                self.write(RankFailure(rank=self.rank, time=time.time(), **_ending(error)))
            raise

    def _echoed(self, failed: RankFailure) -> UserError:
        """The error of `failed`, after reporting that it ends this rank, too."""
        error = failed.error()
        self._echo(error)
        return error

    def _cause(self, error: RanksError) -> UserError:
        """The other rank's error that caused `error`; if there is none, `error` with the ranks that do not answer."""
        self._echo(error)
        deadline = time.monotonic() + BLAME_PATIENCE_S
        other_ranks = set(range(self.size)) - {self.rank}
        while True:
            failed = self.first()
            if failed is not None and failed.rank != self.rank:
                return self._echoed(failed)
            silent = other_ranks - set(self.read())
            if not silent or time.monotonic() > deadline:
                break
            time.sleep(LOOK_AT_RANKS_EVERY_S)
        if silent and not any(f"rank {rank} " in str(error) for rank in silent):
            named = ", ".join(f"rank {rank}" for rank in sorted(silent))
            verb = "does" if len(silent) == 1 else "do"
            error = RanksError.of(f"{named} {verb} not answer: {error}")
            self._echo(error)
        return error

    def _echo(self, error: UserError) -> None:
        code, text = error.exit_code, str(error)
        self.write(RankFailure(rank=self.rank, exit_code=code, text=text, time=time.time(), is_echo=True))


@dataclass(frozen=True)
class ErrorFiles(RankErrors):
    """Exchange of errors in files of a folder, one per failed rank."""

    folder: Path

    def write(self, failure: RankFailure) -> None:
        with contextlib.suppress(UserError):
            path = self.folder / f"error-{failure.rank}.json"
            write_atomic(path, failure.model_dump_json().encode(), sync=False)

    def read(self) -> dict[int, RankFailure]:
        failures = {}
        for path in self.folder.glob("error-*.json"):
            with contextlib.suppress(OSError, ValueError):
                failure = RankFailure.model_validate_json(path.read_bytes())
                failures[failure.rank] = failure
        return failures


def _is_broken_collective(error: BaseException) -> bool:
    """Whether torch raised `error` in a collective that is not called through `World`, such as FSDP's."""
    return isinstance(error, RuntimeError) and (type(error).__name__ in _DIST_ERRORS or "/gloo/" in str(error))


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def _ending(error: BaseException) -> dict[str, Any]:
    """The exit code and text with which `cli.main` reports an error."""
    if isinstance(error, UserError):
        return {"exit_code": error.exit_code, "text": str(error)}
    problem = file_problem(error) if isinstance(error, OSError) else None
    if problem is not None:
        return {"exit_code": DiskError.exit_code, "text": str(problem)}
    return {"exit_code": 1, "text": _last_line(error)}


@contextlib.contextmanager
def as_rank(rank_place: RankPlace | None) -> Iterator[None]:
    """Run the context as one of several ranks: the process ends with its supervisor, and reports its errors to the
    other ranks. Only rank 0 reacts to signals. Without a `rank_place`, the context does nothing.
    """
    if rank_place is None:
        yield
        return
    if rank_place.rank > 0:
        deferred_signals.is_obeying = False
    if rank_place.lifeline is not None and rank_place.folder is not None:
        os.set_inheritable(rank_place.lifeline, False)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # lets rank 0 print although the supervisor owns the terminal
        threading.Thread(
            target=_end_with_supervisor, args=(rank_place.lifeline, rank_place.folder), daemon=True
        ).start()
    errors = rank_place.errors
    with contextlib.nullcontext() if errors is None else errors.reporting_errors():
        yield


def _end_with_supervisor(lifeline: int, folder: Path) -> None:
    """Wait until no process holds the other end of the pipe, then kill this process and its children."""
    if os.read(lifeline, 1) == b"":
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)


@dataclass
class _Rank:
    """A process that the supervisor started."""

    number: int
    process: subprocess.Popen[bytes]
    tail: bytearray = field(default_factory=bytearray)
    """The end of its output; empty for rank 0, which prints to the terminal."""
    reader: threading.Thread | None = None
    was_killed: bool = False
    """Whether the supervisor killed it."""

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.is_alive:
                os.killpg(self.process.pid, number)

    def read_output(self) -> None:
        output = self.process.stdout
        assert output is not None
        with output:
            while chunk := os.read(output.fileno(), 65536):
                self.tail += chunk
                del self.tail[:-RANK_TAIL_BYTES]

    def printed(self) -> str:
        """The end of its output, as text."""
        if self.reader is not None:
            self.reader.join(1.0)  # a surviving child process may keep the pipe open
        return bytes(self.tail).decode(errors="replace").strip()


class Supervisor:
    """Starts the ranks of a run on this machine and waits for them."""

    def __init__(self, size: int, run: RunDirectory, machines: Machines | None = None) -> None:
        """`size` is the number of ranks on this machine; `machines` are the run's machines if there are several."""
        self.size = size
        self.run = run
        self.machines = machines
        self.first_rank = 0 if machines is None else machines.number * size
        self._ranks: list[_Rank] = []
        self._asked_at: float | None = None
        self._is_asked_elsewhere = False
        """Whether another machine was asked to stop."""
        self._kill_at = float("inf")
        self._deadline = float("inf")
        self._forwarded: dict[int, RankFailure] = {}
        self._stop_is_due = False
        """Whether machine 0 must still be informed that this machine was asked to stop."""
        self._main_exit_code: int | None = None
        """On the other machines: exit code of machine 0."""

    def __call__(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
        """Run `command` as every rank and return the run's exit code. The first failed rank's error is printed last."""
        starts, began = status_of(self.run).starts, time.monotonic()
        with tempfile.TemporaryDirectory(prefix="simpletuner-ranks-") as name, self._signals():
            errors = ErrorFiles(-1, self.first_rank + self.size, Path(name))
            lifeline, supervisor_end = os.pipe()
            try:
                for local_rank in range(self.size):
                    self._ranks.append(self._start(local_rank, command, environ, Path(name), lifeline))
                if deferred_signals.first is not None:  # it arrived before our handlers were installed
                    self._forward(deferred_signals.first, None)
                self._wait(errors)
            finally:
                self._end_all()
                os.close(lifeline)
                os.close(supervisor_end)
                for rank in self._ranks:
                    rank.printed()
            code = self._exit_code(errors, starts, began)
            if self.machines is not None:
                self.machines.close(code)
            return code

    def _start(
        self, local_rank: int, command: Sequence[str], environ: Mapping[str, str], folder: Path, lifeline: int
    ) -> _Rank:
        number = self.first_rank + local_rank
        environment = {
            **environ,
            "RANK": str(number),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size),
            RANKS_FOLDER: str(folder),
            RANKS_LIFELINE: str(lifeline),
        }
        inherited = [lifeline]
        listener = None if number or self.machines is None else self.machines.store_listener
        if self.machines is not None:
            environment |= {
                "WORLD_SIZE": str(self.size * self.machines.count),
                "MASTER_ADDR": self.machines.address,
                "MASTER_PORT": str(self.machines.store_port),
            }
            # torch would print warnings about addresses without a host name.
            environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if listener is not None:
            environment[RANKS_LISTENER] = str(listener.fileno())
            inherited.append(listener.fileno())
        # By default, each rank's libraries would use all cores.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // self.size)))
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if number else None,
            stderr=subprocess.STDOUT if number else None,
            pass_fds=inherited,
            process_group=0,  # the terminal's Ctrl-C and Ctrl-Z reach only the supervisor
        )
        if listener is not None:
            listener.close()
        rank = _Rank(number, process)
        if number:
            rank.reader = threading.Thread(target=rank.read_output, daemon=True)
            rank.reader.start()
        return rank

    def _wait(self, errors: ErrorFiles) -> None:
        """Wait until every rank has ended, by itself or killed by this process."""
        ended: set[int] = set()
        while any(rank.is_alive for rank in self._ranks):
            now = time.monotonic()
            for rank in self._ranks:
                if rank.number not in ended and not rank.is_alive:
                    ended.add(rank.number)
                    self._report_silent_end(rank, errors)
                    if rank.number == 0:
                        self._end_within(REST_S)
                    elif rank.process.returncode != 0:
                        self._end_within(GRACE_S)
            if self.machines is not None:
                self._exchange_messages(self.machines, errors)
            if now > min(self._deadline, self._kill_at):
                if self.first_rank and now > self._kill_at:
                    text = f"machine {self.first_rank // self.size} was asked twice to stop and ended at once."
                    errors.write(RankFailure(rank=self.first_rank, exit_code=STOPPED, text=text, time=time.time()))
                self._end_all()
            time.sleep(LOOK_AT_RANKS_EVERY_S)
        for rank in self._ranks:
            if rank.number not in ended:
                self._report_silent_end(rank, errors)
        if self.machines is not None:
            self._exchange_messages(self.machines, errors)

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _exchange_messages(self, machines: Machines, errors: ErrorFiles) -> None:
        """Send this machine's news to the others (machine 0 also forwards theirs), and handle their messages."""
        failures = errors.read()
        for failure in failures.values():
            if self._forwarded.get(failure.rank) != failure:
                self._forwarded[failure.rank] = failure
                of_machine = failure.rank // self.size
                if machines.number in (0, of_machine):
                    for link in machines.links:
                        if link.machine != of_machine:
                            link.send(failure=failure.model_dump())
        if failures.keys() - {rank.number for rank in self._ranks}:
            self._end_within(GRACE_S)
        if self._stop_is_due:
            self._stop_is_due = False
            for link in machines.links:
                link.send(stop=True)
            complain("Asked machine 0 to stop the run; a second SIGINT (Ctrl-C) or SIGTERM exits at once.")
        for link in machines.links:
            for message in link.receive():
                self._handle_message(message, link, errors)
        for machine, reason in machines.unreachable():
            first = machine * self.size
            text = f"rank {first} does not answer: machine {machine} {reason}."
            failure = RankFailure(rank=first, exit_code=RanksError.exit_code, text=text, time=time.time())
            if first not in failures:
                errors.write(failure)
            self._end_within(GRACE_S)
        machines.send_heartbeats()

    def _handle_message(self, message: Mapping[str, Any], link: MachineLink, errors: ErrorFiles) -> None:
        if "failure" in message:
            # The machines' clocks differ: order failures by their arrival.
            errors.write(RankFailure.model_validate(message["failure"]).model_copy(update={"time": time.time()}))
        elif "stop" in message and self._asked_at is None and not self._is_asked_elsewhere:
            self._is_asked_elsewhere = True
            complain(f"Machine {link.machine} was asked to stop.")
            self._ranks[0].process.send_signal(STOP_FROM_OTHER_MACHINE)
        elif "ended" in message:
            link.exit_code = int(message["ended"])
            if link.machine == 0:
                self._main_exit_code = link.exit_code
                self._end_within(REST_S if link.exit_code in (0, STOPPED) else GRACE_S)

    def _report_silent_end(self, rank: _Rank, errors: ErrorFiles) -> None:
        """Report the failure of a rank that ended without reporting it."""
        code = rank.process.returncode
        if code in (0, STOPPED) or rank.was_killed or self._was_ended_by_signal(rank) or rank.number in errors.read():
            return
        if code < 0:
            text = f"rank {rank.number} was killed by signal {-code} ({_signal_name(-code)})."
            if -code == signal.SIGKILL:
                text += " If nobody sent it, the machine ran out of memory: check the system's log (dmesg)."
            code = RanksError.exit_code
        else:
            text = rank.printed().rpartition("\n")[2] or f"rank {rank.number} ended with exit code {code}."
        errors.write(RankFailure(rank=rank.number, exit_code=code, text=text, time=time.time()))

    def _was_ended_by_signal(self, rank: _Rank) -> bool:
        """Whether `rank` is rank 0, and a forwarded signal ended it before it deferred signals."""
        ending = -rank.process.returncode
        is_asked = self._asked_at is not None or self._is_asked_elsewhere
        return rank.number == 0 and is_asked and ending in (*EXIT_SIGNALS, *WARNING_SIGNALS, STOP_FROM_OTHER_MACHINE)

    def _end_all(self) -> None:
        # SIGKILL, because rank 0 continues after SIGTERM until it has saved. Files are written atomically.
        for rank in self._ranks:
            if rank.is_alive:
                rank.was_killed = True
                rank.signal_group(signal.SIGKILL)
        for rank in self._ranks:
            rank.process.wait()

    def _exit_code(self, errors: ErrorFiles, starts: int, began: float) -> int:
        """Report the first failure, unless rank 0 has reported it. Returns the exit code."""
        if self.first_rank > 0:
            code = self._exit_code_without_main(errors)
            if code == STOPPED and self._kill_at == float("inf"):
                complain("stopped with machine 0, which reports what is saved. Run the same commands again to resume.")
            return code
        main, failures = self._ranks[0], errors.read()
        code = main.process.returncode
        if self._was_ended_by_signal(main) or (main.was_killed and self._kill_at < float("inf")):
            return STOPPED
        if code in (0, STOPPED):
            return code
        first = errors.first() or next(iter(failures.values()), None)
        if first is None:  # rank 0 has printed its error
            return code if code > 0 else RanksError.exit_code
        is_reported = code > 0 and 0 in failures and first.text in failures[0].text
        self._report(first, is_reported=is_reported)
        if main.was_killed:
            self._record(first, starts, time.monotonic() - began)
        return code if code > 0 else first.exit_code

    def _exit_code_without_main(self, errors: ErrorFiles) -> int:
        """`_exit_code` on a machine without rank 0. It does not report an end that another machine caused."""
        if self._kill_at < float("inf") or self._main_exit_code in (0, STOPPED):
            return STOPPED if self._main_exit_code is None else self._main_exit_code
        codes = {rank.process.returncode for rank in self._ranks}
        first = errors.first() or next(iter(errors.read().values()), None)
        if codes <= {0, STOPPED} or (first is not None and first.exit_code == STOPPED):
            return STOPPED if codes != {0} else 0
        if first is None:
            complain(f"a process of machine {self.first_rank // self.size} ended without an error message.")
            return RanksError.exit_code
        self._report(first)
        return first.exit_code

    def _report(self, first: RankFailure, *, is_reported: bool = False) -> None:
        """Print the error that ended the run, unless rank 0 has printed it, after the failed rank's own output if it
        ran on this machine."""
        rank = next((rank for rank in self._ranks if rank.number == first.rank), None)
        output = rank.printed() if rank is not None and first.exit_code == 1 else ""
        if output:
            complain(output)
        if output or not is_reported:
            complain(first.named)

    def _record(self, first: RankFailure, starts: int, seconds: float) -> None:
        """Write the last events for rank 0, which was killed before it could write them."""
        status = status_of(self.run)
        if status.starts == starts or status.ended is not None:
            return
        with contextlib.suppress(UserError), self.run.lock(), EventLog(self.run.events, is_new_start=False) as events:
            events.emit(ErrorEvent(exit_code=first.exit_code, text=first.named))
            events.emit(
                EndEvent(reason="error", exit_code=first.exit_code, step=status.step, seconds=round(seconds, 1))
            )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside the context, forward stop signals to rank 0, and the terminal's Ctrl-Z to all ranks."""
        handlers: dict[int, Callable[[int, FrameType | None], None]]
        handlers = {
            **dict.fromkeys((*EXIT_SIGNALS, *WARNING_SIGNALS, STOP_FROM_OTHER_MACHINE), self._forward),
            signal.SIGTSTP: self._pause,
        }
        previous_handlers = {
            number: signal.signal(number, handler)
            for number, handler in handlers.items()
            if signal.getsignal(number) != signal.SIG_IGN  # `nohup` ignores it; the ranks inherit that
        }
        try:
            yield
        finally:
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._stop_is_due = self.first_rank > 0
        elif number in EXIT_SIGNALS and now - self._asked_at >= REPEAT_S:
            self._kill_at = min(self._kill_at, now + LEAVE_S)  # rank 0 may wait in a call that signals do not interrupt
        if self.first_rank == 0 and self._ranks:
            self._ranks[0].process.send_signal(number)

    def _pause(self, *_: object) -> None:
        for rank in self._ranks:
            rank.signal_group(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for rank in self._ranks:  # `fg` or `bg`
            rank.signal_group(signal.SIGCONT)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def usable_cores() -> int:
    """Number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def train_command(arguments: Sequence[str]) -> list[str]:
    """Command line of `simpletuner train ARGUMENTS` with this interpreter."""
    return [sys.executable, "-P", "-m", "simpletuner", "train", *arguments]
