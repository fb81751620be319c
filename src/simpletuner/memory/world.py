"""The processes that train together, as one of them sees it, and what they tell each other.

Between ranks travel tensors and the bytes of JSON, never pickled objects.
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
"""Most bytes that are copied together for one reduction: one call for many small tensors, and little memory."""

LOOK_FOR_RANKS_EVERY_S = 0.05
"""How often a rank that waits at a barrier looks for the others."""

STOP_WITHIN_S = 5.0
"""At most so long does a rank that ends wait for its last sign of life to be written."""

T = TypeVar("T")


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class World:
    """This process's place among those that share a run, and the device that it computes on.

    All ranks call each method in the same order, with the same shapes. Alone, each of them does nothing.
    """

    rank: int
    size: int
    device: torch.device
    signs: "Signs | None" = None
    """Where ranks leave signs of life; None alone."""
    machine: int = 0
    """Number of this rank's machine."""
    machines: int = 1
    group: dist.ProcessGroup | None = None
    """Of these ranks; None where they are all ranks of the run."""
    of_machine: "World | None" = None
    """This rank among those of its own machine, where there are several machines; None where they are all ranks."""
    writers: int | None = None
    """So many of the first ranks see the run's folder; None where all do."""

    @classmethod
    def single(cls) -> "World":
        """One process, on the GPU if there is one."""
        return cls(rank=0, size=1, device=choose_device())

    @property
    def is_main(self) -> bool:
        """Whether this process writes what a run has once: events, checkpoints, images."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def on_machine(self) -> "World":
        """The ranks of this rank's machine: all of them where there is one machine."""
        return self.of_machine or self

    @property
    def writing_ranks(self) -> int:
        """How many ranks, the first ones, see the run's folder."""
        return self.size if self.writers is None else self.writers

    @property
    def errors(self) -> RankErrors | None:
        """Where ranks leave the errors that end them; None alone."""
        return None if self.signs is None else self.signs.errors

    def told(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the ranks tell each other of their errors (`RankErrors.told`)."""
        return contextlib.nullcontext() if self.errors is None else self.errors.told()

    def check(self) -> None:
        """A point at which this rank notices that another failed.

        Raises:
            UserError: another rank's error, of its own class.
        """
        if self.errors is not None:
            self.errors.check()

    def barrier(self, what: str) -> None:
        """Wait until every rank is here. However long the work `what` of one of them takes: as long as it gives signs
        of life.

        Raises:
            RanksError: one has given none for the timeout. It is named.
        """
        if self.signs is not None:
            self.signs.await_all(what)

    def from_main(
        self,
        what: str,
        make: Callable[[], T],
        *,
        record: Callable[[T], Any] = _same,
        restore: Callable[[Any], T] = _same,
    ) -> T:
        """What `make` returns on rank 0, which alone calls it: for downloads, scans, and what depends on files that
        ranks write. The others wait for `what` as at a `barrier`, and `restore` what they return from its `record`, a
        JSON value. Rank 0 returns the value itself.

        Raises:
            RanksError: as `barrier` does.
        """
        if not self.is_main:
            self.barrier(what)
            return restore(self.broadcast_json(None))
        value = make()
        if not self.is_alone:
            self.barrier(what)
            self.broadcast_json(record(value))
        return value

    def from_each_machine(
        self,
        what: str,
        make: Callable[[], T],
        *,
        record: Callable[[T], Any] = _same,
        restore: Callable[[Any], T] = _same,
    ) -> T:
        """`from_main` for each machine: what `make` returns on its first rank. Machine 0 comes first: what it leaves in
        folders that machines share, the others find.

        Raises:
            RanksError: as `barrier` does.
        """
        here = self.of_machine
        if here is None:
            return self.from_main(what, make, record=record, restore=restore)
        values = [here.from_main(what, make, record=record, restore=restore)] if self.machine == 0 else []
        self.barrier(what)
        if self.machine > 0:
            values.append(here.from_main(what, make, record=record, restore=restore))
        self.barrier(what)
        return values[0]

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks: the same bits on each of them. Tensors of one format that lie
        beside each other in `tensors` travel together.

        Raises:
            RanksError: a rank is gone, or is waited for in vain.
        """
        if self.is_alone:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with explained("summing the gradients"):
                dist.all_reduce(flat, group=self.group)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def gather(self, tensor: Tensor, to: int) -> list[Tensor] | None:
        """Every rank's `tensor`, by rank, on rank `to`; None on the others. Bits of any dtype arrive as they are.

        Raises:
            RanksError: a rank is gone, or is waited for in vain.
        """
        if self.is_alone:
            return [tensor]
        sent = tensor.contiguous().view(-1).view(torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self.size)] if self.rank == to else None
        with explained("gathering a tensor"):
            dist.gather(sent, received, group=self.group, group_dst=to)
        return None if received is None else [each.view(tensor.dtype).view(tensor.shape) for each in received]

    @torch.no_grad()
    def gather_pieces(self, piece: Tensor, counts: Sequence[int], to: int) -> Tensor | None:
        """The flat pieces of all ranks, one after the other, on rank `to`; None on the others. Each travels at its own
        size, `counts` elements by rank. Bits of any dtype arrive as they are.

        Raises:
            RanksError: a rank is gone, or is waited for in vain.
        """
        if self.is_alone:
            return piece
        sent = piece.contiguous().view(torch.uint8)
        sends = [len(sent) if rank == to else 0 for rank in range(self.size)]
        receives = [count * piece.itemsize if self.rank == to else 0 for count in counts]
        received = sent.new_empty(sum(receives))
        with explained("gathering a tensor"):
            dist.all_to_all_single(received, sent, receives, sends, group=self.group)
        return received.view(piece.dtype) if self.rank == to else None

    def decide(self, flags: Sequence[bool]) -> list[bool]:
        """Rank 0's `flags`, on every rank.

        Raises:
            RanksError: a rank is gone, or is waited for in vain.
        """
        if self.is_alone:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.uint8)
        with explained("hearing what rank 0 decides"):
            dist.broadcast(values, group=self.group, group_src=0)
        return [bool(value) for value in values.tolist()]

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's `value`, a JSON value, on every rank. Alone it is `value` itself.

        Raises:
            RanksError: a rank is gone, or is waited for in vain.
        """
        if self.is_alone:
            return value
        data = _json_bytes(value) if self.is_main else torch.empty(0, dtype=torch.uint8)
        with explained("hearing what rank 0 decides"):
            length = torch.tensor([len(data)])
            dist.broadcast(length, group=self.group, group_src=0)
            if not self.is_main:
                data = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, group=self.group, group_src=0)
        return json.loads(data.numpy().tobytes())

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's `value`, a JSON value, by rank, on every rank. Numbers come back to the bit.

        Raises:
            RanksError: a rank is gone, or is waited for in vain.
        """
        if self.is_alone:
            return [value]
        data = _json_bytes(value)
        with explained("exchanging messages"):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(data)]), group=self.group)
            longest = int(max(lengths))
            padded = torch.nn.functional.pad(data, (0, longest - len(data)))
            gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(gathered, padded, group=self.group)
        return [json.loads(each[: int(size)].numpy().tobytes()) for each, size in zip(gathered, lengths, strict=True)]


def _json_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors`, in order, in groups of one format, of `BUCKET_BYTES` or a single larger tensor."""
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
def explained(doing: str) -> Iterator[None]:
    """Turn the failure of a collective into a RanksError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0].rpartition("] ")[2]  # without gloo's source file
        raise RanksError.of(f"another process is gone or does not answer, while {doing} ({reason})") from error


@runtime_checkable
class KeyStore(Protocol):
    """What `Signs` needs of torch's stores."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class PatientStore:
    """A store in other threads: one of torch's client waits for ever where the network is cut. What did not answer once
    is not asked again.
    """

    def __init__(self, store: KeyStore, timeout_s: float) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._is_gone = False

    def set(self, key: str, value: str) -> None:
        self._within(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        return self._within(lambda: self._store.get(key))

    def check(self, keys: list[str]) -> bool:
        return self._within(lambda: self._store.check(keys))

    def _within(self, work: Callable[[], T]) -> T:
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(work())
            except RuntimeError as error:
                answer.set_exception(error)

        if not self._is_gone:
            threading.Thread(target=ask, name="store", daemon=True).start()
            with contextlib.suppress(TimeoutError):
                return answer.result(self._timeout_s)
        self._is_gone = True
        raise RuntimeError(f"no answer for {self._timeout_s:.0f} s")


@dataclass(frozen=True)
class ErrorKeys(RankErrors):
    """Errors in a store on rank 0's machine. Once it is out of reach, `read` says so on the other ranks."""

    store: KeyStore
    address: str
    """Of rank 0's machine."""

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
            failures = [self._lost] if self.rank else []
        return {failure.rank: failure for failure in failures}

    @property
    def _lost(self) -> RankFailure:
        text = (
            f"rank 0 is out of reach at {self.address}, and with it the store in which the processes leave their "
            "errors. What ended the run is in rank 0's output."
        )
        return RankFailure(rank=0, exit_code=RanksError.exit_code, text=text, time=time.time())


@dataclass
class Signs:
    """Signs of life of the ranks, and where each of them waits, in a store that all of them reach."""

    store: KeyStore
    rank: int
    ranks: Sequence[int]
    """That wait for each other: all of the run, or those of a machine."""
    timeout_s: float
    errors: RankErrors | None = None
    """Where ranks leave the errors that end them."""
    place: str = "wait"
    """Of these ranks' waits in the store."""
    _waits: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Give a sign of life now and several times within each timeout, until this process ends."""
        self._beat(0)
        thread = threading.Thread(target=self._beats, name="signs of life", daemon=True)
        thread.start()
        # A thread that is inside the store when the interpreter ends would abort the process.
        atexit.register(self._stop, thread)

    def _stop(self, thread: threading.Thread) -> None:
        self._ended.set()
        thread.join(STOP_WITHIN_S)

    def _beats(self) -> None:
        count = 0
        while not self._ended.wait(min(10.0, self.timeout_s / 5)):
            count += 1
            with contextlib.suppress(RuntimeError):  # the store went with its owner
                self._beat(count)

    def _beat(self, count: int) -> None:
        self.store.set(f"alive/{self.rank}", str(count))

    def await_all(self, what: str) -> None:
        """Wait until all ranks call this as often as this one has.

        Raises:
            RanksError: one has given no sign of life for the timeout.
            UserError: the error that ended another rank, of its own class.
            Stopped: a signal asked rank 0 to stop, before the training.
        """
        self._waits += 1
        self.store.set(f"{self.place}/{self._waits}/{self.rank}", what)
        last: dict[int, tuple[bytes, float]] = {}
        missing = {*self.ranks} - {self.rank}
        while missing:
            if self.errors is not None:
                self.errors.check()
            stop_if_asked()  # rank 0 alone obeys, and not within the training
            missing = {rank for rank in missing if not self._has(f"{self.place}/{self._waits}/{rank}")}
            now = time.monotonic()
            silent = []
            for rank in missing:
                sign = self.store.get(f"alive/{rank}") if self._has(f"alive/{rank}") else b""
                if rank not in last or last[rank][0] != sign:
                    last[rank] = sign, now
                elif now - last[rank][1] > self.timeout_s:
                    silent.append(rank)
            if silent:
                raise RanksError.of(
                    f"{named(silent)} gave no sign of life for {self.timeout_s:.0f} s, while this process waited for "
                    f"{what}"
                )
            if missing:
                time.sleep(LOOK_FOR_RANKS_EVERY_S)

    def _has(self, key: str) -> bool:
        try:
            return bool(self.store.check([key]))
        except RuntimeError as error:
            raise RanksError.of(f"the processes' common store is gone ({error})") from error


def named(ranks: Sequence[int]) -> str:
    """ "rank 1", "ranks 1, 3"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"
