"""The processes of one run: a supervisor starts them, passes signals on, and reports which of them failed first.

Rank 0 has the terminal and writes the run. The others' output is kept by the supervisor and shown where it explains an
error. All of them meet in a private folder, in which each leaves the error that ended it.
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
from simpletuner.base.signals import ASKED_ELSEWHERE, AT_ONCE, REPEAT_S, STOPPED, WARNINGS, deferred_signals
from simpletuner.runs.events import EndEvent, ErrorEvent, EventLog
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.machines import MachineLine, Machines
from simpletuner.runs.status import status_of

RANKS_FOLDER = "RANKS_FOLDER"
"""Environment variable: the private folder in which the processes of a run meet."""
RANKS_LIFELINE = "RANKS_LIFELINE"
"""Environment variable: the number of an open pipe that ends with the supervisor."""
RANKS_LISTENER = "RANKS_LISTENER"
"""Environment variable of rank 0 on several machines: the number of the socket on which its store listens."""
GRACE_S = 15.0
"""Time in which rank 0 fails by itself and writes its events, after another rank failed."""
REST_S = 2.0
"""Time for the other ranks to end once rank 0 has: they have nothing left to write."""
LEAVE_S = 5.0
"""Time for rank 0 to obey a second Ctrl-C before every rank is killed."""
BLAME_PATIENCE_S = 3.0
"""How long a rank whose collective failed waits for the error of the rank that caused it."""
LOOK_AT_RANKS_EVERY_S = 0.05
RANK_TAIL_BYTES = 16 * 1024
"""Of what a rank printed last."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_DIST_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
"""Names of torch's classes, all of them RuntimeErrors: this module imports no torch."""
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class RankPlace:
    """The place of this process among several, as its environment says."""

    rank: int
    size: int
    local_rank: int
    """Of this machine's: the GPU that it computes on."""
    local_size: int
    """Processes on each machine."""
    folder: Path | None = None
    """Private folder of our own supervisor's ranks; None under torchrun."""
    lifeline: int | None = None
    """A pipe that ends when the supervisor does; None under torchrun."""

    @property
    def machine(self) -> int:
        return self.rank // self.local_size

    @property
    def machines(self) -> int:
        return self.size // self.local_size

    @property
    def errors(self) -> "ErrorFiles | None":
        """Where the ranks of our own supervisor leave their errors."""
        return None if self.folder is None else ErrorFiles(self.rank, self.size, self.folder)


def place_of(environ: Mapping[str, str]) -> RankPlace | None:
    """Where this process stands among several that our supervisor or torchrun started; None for one on its own.

    Raises:
        ConfigError: the environment is incomplete or contradicts itself.
    """
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    ours = environ.get(RANKS_FOLDER)
    needed = ("RANK", "WORLD_SIZE") if environ.get("WORLD_SIZE") == "1" else _NUMBERS if ours else _TORCHRUN
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
    # On one machine launchers may give each process a GPU of its own, which is its number 0.
    if not local_size or size % local_size or (size > local_size and rank % local_size != local_rank):
        raise ConfigError.of(
            f"RANK={rank} with WORLD_SIZE={size}, LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_size}",
            "as many processes on each machine, numbered machine by machine",
            "Start torchrun on each machine with the same --nproc-per-node.",
        )
    lifeline = environ.get(RANKS_LIFELINE)
    return RankPlace(
        rank,
        size,
        local_rank,
        local_size,
        Path(ours) if ours else None,
        int(lifeline) if ours and lifeline else None,
    )


class RankFailure(BaseModel):
    """The error that ended a rank, as the file that tells the others of it has it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    rank: int
    exit_code: int
    text: str
    time: float
    """Seconds since the epoch."""
    is_echo: bool = False
    """Whether it only followed from another rank's: a collective that failed."""

    @property
    def named(self) -> str:
        """The text with the rank's name."""
        return self.text if self.text.startswith(f"rank {self.rank} ") else f"rank {self.rank}: {self.text}"

    def error(self) -> UserError:
        """It as an error of its class."""
        return error_class(self.exit_code).of(self.named)


@dataclass(frozen=True)
class RankErrors(ABC):
    """Where the ranks tell each other what ended them."""

    rank: int
    size: int

    @abstractmethod
    def write(self, failure: RankFailure) -> None:
        """Tell the others. That it cannot be written changes no error."""

    @abstractmethod
    def read(self) -> dict[int, RankFailure]:
        """Those told so far, by rank."""

    def first(self) -> RankFailure | None:
        """The earliest that did not follow from another."""
        causes = [failure for failure in self.read().values() if not failure.is_echo]
        return min(causes, key=lambda failure: failure.time, default=None)

    def check(self) -> None:
        """A point at which this rank notices that another failed.

        Raises:
            UserError: another rank's error, named, of its own class.
        """
        failed = self.first()
        if failed is not None and failed.rank != self.rank:
            raise self._named(failed)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Inside, this rank reports its errors to the others. Where another rank's error broke a collective,
        that error is raised.

        Raises:
            UserError: another rank's error in place of the RanksError that followed from it.
        """
        try:
            yield
        except RanksError as error:
            if self.rank in self.read():  # `check` raised it, or an inner block named it
                raise
            raise self._explained(error) from error
        except BaseException as error:
            if _is_broken_collective(error):
                broken = RanksError.of(f"another process is gone or does not answer ({_last_line(error)})")
                raise self._explained(broken) from error
            if self.rank not in self.read():
                self.write(RankFailure(rank=self.rank, time=time.time(), **_ending(error)))
            raise

    def _named(self, failed: RankFailure) -> UserError:
        error = failed.error()
        self._echo(error)
        return error

    def _explained(self, error: RanksError) -> UserError:
        """The error that caused `error`, or `error` with the ranks that do not answer."""
        self._echo(error)
        deadline = time.monotonic() + BLAME_PATIENCE_S
        others = set(range(self.size)) - {self.rank}
        while True:
            failed = self.first()
            if failed is not None and failed.rank != self.rank:
                return self._named(failed)
            silent = others - set(self.read())
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
    """Errors in files of a folder, one for each rank that failed."""

    folder: Path

    def write(self, failure: RankFailure) -> None:
        with contextlib.suppress(UserError):
            path = self.folder / f"error-{failure.rank}.json"
            write_atomic(path, failure.model_dump_json().encode(), sync=False)

    def read(self) -> dict[int, RankFailure]:
        found = {}
        for path in self.folder.glob("error-*.json"):
            with contextlib.suppress(OSError, ValueError):
                failure = RankFailure.model_validate_json(path.read_bytes())
                found[failure.rank] = failure
        return found


def _is_broken_collective(error: BaseException) -> bool:
    """Whether torch raised it in a collective that is not called through `World`, such as those of FSDP."""
    return isinstance(error, RuntimeError) and (type(error).__name__ in _DIST_ERRORS or "/gloo/" in str(error))


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def _ending(error: BaseException) -> dict[str, Any]:
    """Exit code and text of what `cli.main` makes of an error."""
    if isinstance(error, UserError):
        return {"exit_code": error.exit_code, "text": str(error)}
    problem = file_problem(error) if isinstance(error, OSError) else None
    if problem is not None:
        return {"exit_code": DiskError.exit_code, "text": str(problem)}
    return {"exit_code": 1, "text": _last_line(error)}


@contextlib.contextmanager
def as_rank(place: RankPlace | None) -> Iterator[None]:
    """Inside, this process is one of several: it ends with its supervisor, and tells the others of its errors. Signals
    are rank 0's to obey. Without a `place`, nothing of this.
    """
    if place is None:
        yield
        return
    if place.rank > 0:
        deferred_signals.is_obeying = False
    if place.lifeline is not None and place.folder is not None:
        os.set_inheritable(place.lifeline, False)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # rank 0 may print, though the terminal is the supervisor's
        threading.Thread(target=_end_with_supervisor, args=(place.lifeline, place.folder), daemon=True).start()
    errors = place.errors
    with contextlib.nullcontext() if errors is None else errors.told():
        yield


def _end_with_supervisor(lifeline: int, folder: Path) -> None:
    """Wait until no process holds the other end of the pipe, then end this one and its children."""
    if os.read(lifeline, 1) == b"":
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)


@dataclass
class _Rank:
    """A process that the supervisor started."""

    number: int
    process: subprocess.Popen[bytes]
    tail: bytearray = field(default_factory=bytearray)
    """What it printed last; of rank 0 nothing, which prints to the terminal."""
    reader: threading.Thread | None = None
    was_ended: bool = False
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
            self.reader.join(1.0)  # a process that it left behind may keep the pipe open
        return bytes(self.tail).decode(errors="replace").strip()


class Supervisor:
    """Starts the ranks of a run on this machine and waits for them."""

    def __init__(self, size: int, run: RunDirectory, machines: Machines | None = None) -> None:
        """`size` is the number of ranks on this machine, the `machines` those of the run, where there are several."""
        self.size = size
        self.run = run
        self.machines = machines
        self.first_rank = 0 if machines is None else machines.number * size
        self._ranks: list[_Rank] = []
        self._asked_at: float | None = None
        self._is_asked_elsewhere = False
        """Whether another machine was asked to stop."""
        self._leave_at = float("inf")
        self._deadline = float("inf")
        self._passed_on: dict[int, RankFailure] = {}
        self._stop_is_due = False
        """Whether machine 0 has yet to hear that this one was asked to stop."""
        self._ended: int | None = None
        """Exit code with which machine 0 ended, on the others."""

    def __call__(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
        """Run `command` as every rank; returns the exit code of the run. The first failing rank's error comes last.

        Raises:
            Stopped: a signal arrived before.
        """
        starts, began = status_of(self.run).starts, time.monotonic()
        with tempfile.TemporaryDirectory(prefix="simpletuner-ranks-") as name, self._signals():
            errors = ErrorFiles(-1, self.first_rank + self.size, Path(name))
            lifeline, mine = os.pipe()
            try:
                for local_rank in range(self.size):
                    self._ranks.append(self._start(local_rank, command, environ, Path(name), lifeline))
                if deferred_signals.first is not None:  # between the last safe point and our own handlers
                    self._forward(deferred_signals.first, None)
                self._wait(errors)
            finally:
                self._end_all()
                os.close(lifeline)
                os.close(mine)
                for rank in self._ranks:
                    rank.printed()
            code = self._concluded(errors, starts, began)
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
            # torch would warn on the screen of addresses without a name.
            environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if listener is not None:
            environment[RANKS_LISTENER] = str(listener.fileno())
            inherited.append(listener.fileno())
        # Each of the libraries would take every core.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // self.size)))
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if number else None,
            stderr=subprocess.STDOUT if number else None,
            pass_fds=inherited,
            process_group=0,  # Ctrl-C and Ctrl-Z of the terminal reach the supervisor alone
        )
        if listener is not None:
            listener.close()
        rank = _Rank(number, process)
        if number:
            rank.reader = threading.Thread(target=rank.read_output, daemon=True)
            rank.reader.start()
        return rank

    def _wait(self, errors: ErrorFiles) -> None:
        """Until every rank has ended, by itself or killed by this one."""
        known: set[int] = set()
        while any(rank.is_alive for rank in self._ranks):
            now = time.monotonic()
            for rank in self._ranks:
                if rank.number not in known and not rank.is_alive:
                    known.add(rank.number)
                    self._note_ending(rank, errors)
                    if rank.number == 0:
                        self._end_within(REST_S)
                    elif rank.process.returncode != 0:
                        self._end_within(GRACE_S)
            if self.machines is not None:
                self._talk(self.machines, errors)
            if now > min(self._deadline, self._leave_at):
                if self.first_rank and now > self._leave_at:
                    text = f"machine {self.first_rank // self.size} was told to leave at once."
                    errors.write(RankFailure(rank=self.first_rank, exit_code=STOPPED, text=text, time=time.time()))
                self._end_all()
            time.sleep(LOOK_AT_RANKS_EVERY_S)
        for rank in self._ranks:
            if rank.number not in known:
                self._note_ending(rank, errors)
        if self.machines is not None:
            self._talk(self.machines, errors)

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _talk(self, machines: Machines, errors: ErrorFiles) -> None:
        """Pass on what happened on this machine and, on machine 0, on the others; take note of what they say."""
        told = errors.read()
        for failure in told.values():
            if self._passed_on.get(failure.rank) != failure:
                self._passed_on[failure.rank] = failure
                of_machine = failure.rank // self.size
                if machines.number in (0, of_machine):
                    for line in machines.lines:
                        if line.machine != of_machine:
                            line.send(failure=failure.model_dump())
        if told.keys() - {rank.number for rank in self._ranks}:
            self._end_within(GRACE_S)
        if self._stop_is_due:
            self._stop_is_due = False
            for line in machines.lines:
                line.send(stop=True)
            complain("Machine 0 is asked to stop the run; once more to leave at once.")
        for line in machines.lines:
            for message in line.receive():
                self._take(message, line, errors)
        for machine, why in machines.lost():
            first = machine * self.size
            text = f"rank {first} does not answer: machine {machine} {why}."
            failure = RankFailure(rank=first, exit_code=RanksError.exit_code, text=text, time=time.time())
            if first not in told:
                errors.write(failure)
            self._end_within(GRACE_S)
        machines.give_signs()

    def _take(self, message: Mapping[str, Any], line: MachineLine, errors: ErrorFiles) -> None:
        if "failure" in message:
            # Clocks of machines differ: what comes first counts as first.
            errors.write(RankFailure.model_validate(message["failure"]).model_copy(update={"time": time.time()}))
        elif "stop" in message and self._asked_at is None and not self._is_asked_elsewhere:
            self._is_asked_elsewhere = True
            complain(f"Machine {line.machine} was asked to stop.")
            self._ranks[0].process.send_signal(ASKED_ELSEWHERE)
        elif "ended" in message:
            line.ended = int(message["ended"])
            if line.machine == 0:
                self._ended = line.ended
                self._end_within(REST_S if line.ended in (0, STOPPED) else GRACE_S)

    def _note_ending(self, rank: _Rank, errors: ErrorFiles) -> None:
        """Tell the other ranks of one that ended without a word."""
        code = rank.process.returncode
        if code in (0, STOPPED) or rank.was_ended or self._obeyed_early(rank) or rank.number in errors.read():
            return
        if code < 0:
            text = f"rank {rank.number} was killed by signal {-code} ({_signal_name(-code)})."
            if -code == signal.SIGKILL:
                text += " Where nobody sent it, the machine was out of memory: the system's log (dmesg) says so."
            code = RanksError.exit_code
        else:
            text = rank.printed().rpartition("\n")[2] or f"rank {rank.number} ended with exit code {code}."
        errors.write(RankFailure(rank=rank.number, exit_code=code, text=text, time=time.time()))

    def _obeyed_early(self, rank: _Rank) -> bool:
        """Whether it is rank 0, and a signal that was passed on ended it before it could hold signals back."""
        ending = -rank.process.returncode
        is_asked = self._asked_at is not None or self._is_asked_elsewhere
        return rank.number == 0 and is_asked and ending in (*AT_ONCE, *WARNINGS, ASKED_ELSEWHERE)

    def _end_all(self) -> None:
        # Not by TERM, which asks rank 0 to go on until it has saved. Whatever is killed leaves whole files.
        for rank in self._ranks:
            if rank.is_alive:
                rank.was_ended = True
                rank.signal_group(signal.SIGKILL)
        for rank in self._ranks:
            rank.process.wait()

    def _concluded(self, errors: ErrorFiles, starts: int, began: float) -> int:
        """Report the first failure, unless rank 0 has; returns the exit code."""
        if self.first_rank > 0:
            code = self._concluded_elsewhere(errors)
            if code == STOPPED and self._leave_at == float("inf"):
                complain("stopped with machine 0, which says what is saved. Give the same commands again to go on.")
            return code
        main, told = self._ranks[0], errors.read()
        code = main.process.returncode
        if self._obeyed_early(main) or (main.was_ended and self._leave_at < float("inf")):
            return STOPPED
        if code in (0, STOPPED):
            return code
        first = errors.first() or next(iter(told.values()), None)
        if first is None:  # rank 0 said what ended it
            return code if code > 0 else RanksError.exit_code
        is_reported = code > 0 and 0 in told and first.text in told[0].text
        self._report(first, is_reported=is_reported)
        if main.was_ended:
            self._record(first, starts, time.monotonic() - began)
        return code if code > 0 else first.exit_code

    def _concluded_elsewhere(self, errors: ErrorFiles) -> int:
        """The same on a machine that has not rank 0, which says nothing of an end that is none of its own."""
        if self._leave_at < float("inf") or self._ended in (0, STOPPED):
            return STOPPED if self._ended is None else self._ended
        codes = {rank.process.returncode for rank in self._ranks}
        first = errors.first() or next(iter(errors.read().values()), None)
        if codes <= {0, STOPPED} or (first is not None and first.exit_code == STOPPED):
            return STOPPED if codes != {0} else 0
        if first is None:
            complain(f"a process of machine {self.first_rank // self.size} ended without a word.")
            return RanksError.exit_code
        self._report(first)
        return first.exit_code

    def _report(self, first: RankFailure, *, is_reported: bool = False) -> None:
        """Print the error that ended the run, unless rank 0 has, and what a rank of this machine printed before it."""
        rank = next((rank for rank in self._ranks if rank.number == first.rank), None)
        output = rank.printed() if rank is not None and first.exit_code == 1 else ""
        if output:
            complain(output)
        if output or not is_reported:
            complain(first.named)

    def _record(self, first: RankFailure, starts: int, seconds: float) -> None:
        """End the events of rank 0, which was killed before it could."""
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
        """Inside, signals that ask for the end are rank 0's, and a stop from the terminal is everybody's."""
        handlers: dict[int, Callable[[int, FrameType | None], None]]
        handlers = {**dict.fromkeys((*AT_ONCE, *WARNINGS, ASKED_ELSEWHERE), self._forward), signal.SIGTSTP: self._pause}
        before = {
            number: signal.signal(number, handler)
            for number, handler in handlers.items()
            if signal.getsignal(number) != signal.SIG_IGN  # as `nohup` asks; the ranks inherit it
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._stop_is_due = self.first_rank > 0
        elif number in AT_ONCE and now - self._asked_at >= REPEAT_S:
            self._leave_at = min(self._leave_at, now + LEAVE_S)  # it may wait where no signal reaches it
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
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def train_command(arguments: Sequence[str]) -> list[str]:
    """`simpletuner train ARGUMENTS` as this interpreter runs it."""
    return [sys.executable, "-P", "-m", "simpletuner", "train", *arguments]
