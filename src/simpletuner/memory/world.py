"""Communication between the ranks of a run: collectives, barriers, and errors.

Ranks exchange tensors and JSON, never pickled objects.
"""

import atexit
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch import distributed as dist

from simpletuner.base.errors import RanksError
from simpletuner.memory.device import choose_device
from simpletuner.runs.process import stop_if_asked
from simpletuner.runs.ranks import RankErrors, RankFailure

BUCKET_BYTES = 64 * 2**20
"""Maximum bytes of tensors that one reduction combines: few calls for small tensors, and little extra memory."""

LOOK_FOR_RANKS_EVERY_S = 0.05
"""Seconds between the checks that a rank makes while it waits at a barrier."""

STOP_WITHIN_S = 5.0
"""Maximum number of seconds that an ending rank waits for its last heartbeat to be written."""

T = TypeVar("T")


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class World:
    """This process's rank among the processes of a run, and the device that it computes on.

    All ranks must call the methods in the same order, with the same shapes. With one process no method communicates.
    """

    rank: int
    size: int
    device: torch.device
    heartbeats: "Heartbeats | None" = None
    """The ranks' heartbeats; None with one process."""
    machine: int = 0
    """Number of this rank's machine, from 0."""
    machines: int = 1
    """Number of machines."""
    group: dist.ProcessGroup | None = None
    """Process group of these ranks; None if they are all ranks of the run."""
    machine_world: "World | None" = None
    """The ranks of this rank's machine, if there are several machines; None with one machine."""
    writers: int | None = None
    """Number of ranks, from rank 0, that can access the run's folder; None if all can."""

    @classmethod
    def single(cls) -> "World":
        """One process, on the GPU if there is one."""
        return cls(rank=0, size=1, device=choose_device())

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's events, checkpoints and images."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def on_machine(self) -> "World":
        """The ranks of this rank's machine: all ranks if there is one machine."""
        return self.machine_world or self

    @property
    def writing_ranks(self) -> int:
        """Number of ranks, from rank 0, that can access the run's folder."""
        return self.size if self.writers is None else self.writers

    @property
    def errors(self) -> RankErrors | None:
        """The store of errors that ended ranks; None with one process."""
        return None if self.heartbeats is None else self.heartbeats.errors

    def reporting_errors(self) -> contextlib.AbstractContextManager[None]:
        """Report errors raised inside this context to the other ranks (`RankErrors.reporting_errors`)."""
        return contextlib.nullcontext() if self.errors is None else self.errors.reporting_errors()

    def check(self) -> None:
        """Raise the error of another rank, if one has failed.

        Raises:
            UserError: another rank's error, of its own class.
        """
        if self.errors is not None:
            self.errors.check()

    def barrier(self, work: str) -> None:
        """Wait until every rank has called this. `work` says, for messages, what the ranks do before the call.

        The work may take any time as long as every rank sends heartbeats.

        Raises:
            RanksError: a rank has sent no heartbeat for the timeout. The message names it.
        """
        if self.heartbeats is not None:
            self.heartbeats.await_all(work)

    def run_on_main(
        self,
        work: str,
        make: Callable[[], T],
        *,
        record: Callable[[T], Any] = _unchanged,
        restore: Callable[[Any], T] = _unchanged,
    ) -> T:
        """Call `make` on rank 0 only and return its value on every rank.

        Used for downloads, scans, and results that depend on files that ranks write. The other ranks wait as at
        `barrier(work)`. Rank 0 sends `record(value)`, a JSON value, and they return `restore` of it.

        Raises:
            RanksError: as `barrier`.
        """
        if not self.is_main:
            self.barrier(work)
            return restore(self.broadcast_json(None))
        value = make()
        if not self.is_alone:
            self.barrier(work)
            self.broadcast_json(record(value))
        return value

    def run_on_each_machine(
        self,
        work: str,
        make: Callable[[], T],
        *,
        record: Callable[[T], Any] = _unchanged,
        restore: Callable[[Any], T] = _unchanged,
    ) -> T:
        """`run_on_main` for each machine: call `make` on the first rank of each machine.

        Machine 0 goes first, so the others find the files that it writes to shared folders.

        Raises:
            RanksError: as `barrier`.
        """
        machine_world = self.machine_world
        if machine_world is None:
            return self.run_on_main(work, make, record=record, restore=restore)
        values = [machine_world.run_on_main(work, make, record=record, restore=restore)] if self.machine == 0 else []
        self.barrier(work)
        if self.machine > 0:
            values.append(machine_world.run_on_main(work, make, record=record, restore=restore))
        self.barrier(work)
        return values[0]

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in place. The sums are bit-identical on all ranks.

        Consecutive tensors of the same dtype are sent together.

        Raises:
            RanksError: a rank is gone or timed out.
        """
        if self.is_alone:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with collective_errors_reported("summing the gradients"):
                dist.all_reduce(flat, group=self.group)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def gather_pieces(self, piece: Tensor, counts: Sequence[int], to: int) -> Tensor | None:
        """Concatenate the flat pieces of all ranks on rank `to`; None on the others. Bit-identical for every dtype.

        Pieces may differ in size; `counts` has the number of elements of each rank.

        Raises:
            RanksError: a rank is gone or timed out.
        """
        if self.is_alone:
            return piece
        sent = piece.contiguous().view(torch.uint8)
        sends = [len(sent) if rank == to else 0 for rank in range(self.size)]
        receives = [count * piece.itemsize if self.rank == to else 0 for count in counts]
        received = sent.new_empty(sum(receives))
        with collective_errors_reported("gathering a tensor"):
            dist.all_to_all_single(received, sent, receives, sends, group=self.group)
        return received.view(piece.dtype) if self.rank == to else None

    def decide(self, flags: Sequence[bool]) -> list[bool]:
        """Rank 0's `flags`, on every rank.

        Raises:
            RanksError: a rank is gone or timed out.
        """
        if self.is_alone:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.uint8)
        with collective_errors_reported("receiving a decision of rank 0"):
            dist.broadcast(values, group=self.group, group_src=0)
        return [bool(value) for value in values.tolist()]

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's `value`, a JSON value, on every rank. With one process, `value` itself.

        Raises:
            RanksError: a rank is gone or timed out.
        """
        if self.is_alone:
            return value
        data = _json_bytes(value) if self.is_main else torch.empty(0, dtype=torch.uint8)
        with collective_errors_reported("receiving a message from rank 0"):
            length = torch.tensor([len(data)])
            dist.broadcast(length, group=self.group, group_src=0)
            if not self.is_main:
                data = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, group=self.group, group_src=0)
        return json.loads(data.numpy().tobytes())

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's `value`, a JSON value, by rank, on every rank. Numbers are bit-identical.

        Raises:
            RanksError: a rank is gone or timed out.
        """
        if self.is_alone:
            return [value]
        data = _json_bytes(value)
        with collective_errors_reported("exchanging messages"):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(data)]), group=self.group)
            longest = int(max(lengths))
            padded = torch.nn.functional.pad(data, (0, longest - len(data)))
            gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(gathered, padded, group=self.group)
        return [
            json.loads(message[: int(size)].numpy().tobytes()) for message, size in zip(gathered, lengths, strict=True)
        ]


def _json_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group `tensors`, in order, into buckets of one dtype: at most `BUCKET_BYTES`, or a single larger tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


@contextlib.contextmanager
def collective_errors_reported(doing: str) -> Iterator[None]:
    """Turn the failure of a collective in this context into a RanksError; `doing` says what failed."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0].rpartition("] ")[2]  # without gloo's source file
        raise RanksError.of(f"another process is gone or does not answer, while {doing} ({reason})") from error


@runtime_checkable
class KeyStore(Protocol):
    """The methods of torch's stores that `Heartbeats` uses."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class PatientStore:
    """Proxy of a store that calls it in other threads and times out.

    torch's own client waits forever if the network is cut. After one timeout the store is not called again.
    """

    def __init__(self, store: KeyStore, timeout_s: float) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._is_gone = False

    def set(self, key: str, value: str) -> None:
        self._call(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        return self._call(lambda: self._store.get(key))

    def check(self, keys: list[str]) -> bool:
        return self._call(lambda: self._store.check(keys))

    def _call(self, call: Callable[[], T]) -> T:
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(call())
            except RuntimeError as error:
                answer.set_exception(error)

        if not self._is_gone:
            threading.Thread(target=run, name="store", daemon=True).start()
            with contextlib.suppress(TimeoutError):
                return answer.result(self._timeout_s)
        self._is_gone = True
        raise RuntimeError(f"no answer for {self._timeout_s:.0f} s")


@dataclass(frozen=True)
class ErrorKeys(RankErrors):
    """Errors of ranks, in a store on rank 0's machine. If it cannot be reached, `read` returns that as an error."""

    store: KeyStore
    address: str
    """Address of rank 0's machine."""

    def write(self, failure: RankFailure) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.set(f"error/{failure.rank}", failure.model_dump_json())
            self.store.set("error", "")

    def read(self) -> dict[int, RankFailure]:
        try:
            if not self.store.check(["error"]):
                return {}
            keys = [key for key in (f"error/{rank}" for rank in range(self.size)) if self.store.check([key])]
            failures = [RankFailure.model_validate_json(self.store.get(key)) for key in keys]
        except RuntimeError:
            failures = [self._unreachable] if self.rank else []
        return {failure.rank: failure for failure in failures}

    @property
    def _unreachable(self) -> RankFailure:
        text = (
            f"rank 0 is out of reach at {self.address}, and so is the store of the processes' errors. Rank 0's output "
            "says what ended the run."
        )
        return RankFailure(rank=0, exit_code=RanksError.exit_code, text=text, time=time.time())


@dataclass
class Heartbeats:
    """Heartbeats of the ranks, and the barriers that each has reached, in a store that all of them can access."""

    store: KeyStore
    rank: int
    ranks: Sequence[int]
    """The ranks that wait for each other: all of the run, or those of one machine."""
    timeout_s: float
    errors: RankErrors | None = None
    """The store of errors that ended ranks."""
    key_prefix: str = "wait"
    """Prefix of these ranks' keys for barriers in the store."""
    _waits: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Send a heartbeat now, and then several per timeout until this process ends."""
        self._beat(0)
        thread = threading.Thread(target=self._beats, name="heartbeats", daemon=True)
        thread.start()
        # A thread that calls the store while the interpreter shuts down would abort the process.
        atexit.register(self._stop, thread)

    def _stop(self, thread: threading.Thread) -> None:
        self._ended.set()
        thread.join(STOP_WITHIN_S)

    def _beats(self) -> None:
        count = 0
        while not self._ended.wait(min(10.0, self.timeout_s / 5)):
            count += 1
            with contextlib.suppress(RuntimeError):  # the store's process has ended
                self._beat(count)

    def _beat(self, count: int) -> None:
        self.store.set(f"alive/{self.rank}", str(count))

    def await_all(self, work: str) -> None:
        """Wait until all ranks have called this as often as this rank.

        Raises:
            RanksError: a rank has sent no heartbeat for the timeout.
            UserError: the error that ended another rank, of its own class.
            Stopped: a signal asked rank 0 to stop, before the training.
        """
        self._waits += 1
        self.store.set(f"{self.key_prefix}/{self._waits}/{self.rank}", work)
        last_heartbeats: dict[int, tuple[bytes, float]] = {}
        missing = {*self.ranks} - {self.rank}
        while missing:
            if self.errors is not None:
                self.errors.check()
            stop_if_asked()  # only rank 0 reacts, and only before the training
            missing = {rank for rank in missing if not self._has(f"{self.key_prefix}/{self._waits}/{rank}")}
            now = time.monotonic()
            silent = []
            for rank in missing:
                heartbeat = self.store.get(f"alive/{rank}") if self._has(f"alive/{rank}") else b""
                if rank not in last_heartbeats or last_heartbeats[rank][0] != heartbeat:
                    last_heartbeats[rank] = heartbeat, now
                elif now - last_heartbeats[rank][1] > self.timeout_s:
                    silent.append(rank)
            if silent:
                raise RanksError.of(
                    f"{ranks_text(silent)} sent no heartbeat for {self.timeout_s:.0f} s, while this process waited "
                    f"for {work}"
                )
            if missing:
                time.sleep(LOOK_FOR_RANKS_EVERY_S)

    def _has(self, key: str) -> bool:
        try:
            return bool(self.store.check([key]))
        except RuntimeError as error:
            raise RanksError.of(f"the processes' common store is gone ({error})") from error


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 1", "ranks 1, 3"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"
