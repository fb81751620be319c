"""Ranks as threads of one process: for what ranks do with files, without starting processes."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from simpletuner.memory.world import World

T = TypeVar("T")

ALONE = World(0, 1, torch.device("cpu"))


@dataclass
class Meeting:
    """What threads share that are each other's ranks."""

    barrier: threading.Barrier
    text: str = ""
    """What is broadcast, as JSON."""
    texts: dict[int, str] = field(default_factory=dict)
    """What is gathered, by rank."""
    waits: list[str] = field(default_factory=list)
    """What rank 0 waited for."""


@dataclass(frozen=True, kw_only=True)
class ThreadWorld(World):
    """A rank that is a thread. A rank that fails breaks the others' waits."""

    meeting: Meeting

    def barrier(self, what: str) -> None:
        if self.is_main:
            self.meeting.waits.append(what)
        self.meeting.barrier.wait(timeout=60)

    def broadcast_json(self, value: Any) -> Any:
        if self.is_main:
            self.meeting.text = json.dumps(value)
        self.meeting.barrier.wait(timeout=60)
        received = json.loads(self.meeting.text)
        self.meeting.barrier.wait(timeout=60)
        return received

    def gather_json(self, value: Any) -> list[Any]:
        self.meeting.texts[self.rank] = json.dumps(value)
        self.meeting.barrier.wait(timeout=60)
        received = [json.loads(self.meeting.texts[rank]) for rank in range(self.size)]
        self.meeting.barrier.wait(timeout=60)
        return received


def on_ranks(size: int, work: Callable[[World], T], *, machines: int = 1) -> list[T]:
    """What `work` returns on each of `size` ranks, as if on so many machines. Raises what the first failing one
    raised.
    """
    device, each = torch.device("cpu"), size // machines
    meeting, *of_machine = (Meeting(threading.Barrier(count)) for count in (size, *[each] * machines))
    raised: list[BaseException] = []
    broken: list[BaseException] = []
    """Waits that ended because another rank failed, or after their timeout."""

    def world(number: int) -> World:
        machine, local = divmod(number, each)
        here = ThreadWorld(local, each, device, machine=machine, meeting=of_machine[machine])
        others = here if machines > 1 else None
        return ThreadWorld(
            number, size, device, machine=machine, machines=machines, machine_world=others, meeting=meeting
        )

    def rank(number: int) -> T | None:
        try:
            return work(world(number))
        except BaseException as error:  # noqa: BLE001  raised by the caller's thread
            (broken if isinstance(error, threading.BrokenBarrierError) else raised).append(error)
            for each in (meeting, *of_machine):
                each.barrier.abort()
            return None

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(rank, range(size)))
    for error in (*raised, *broken):
        raise error
    return [result for result in results if result is not None]
