"""Events of runs as server-sent events: what is in the file from an id on, then what is appended.

Nothing is queued for a client: each knows its place in the file and reads on from there when it has taken what it was
sent, so a slow one costs no memory. One task a run looks whether the file changed, however many clients there are.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.server.series import Indexes, numbered, whole_lines

LOOK_EVERY_S = 0.5
HEARTBEAT_S = 15.0
HEARTBEAT = b":\n\n"
RESET = b"event: reset\ndata: {}\n\n"
"""Sent where the file does not go on where the client stands: it starts anew, and so must the client."""

Identity = tuple[int, int]
"""Device and inode of a file."""


@dataclass(frozen=True)
class _Place:
    """Where a client stands; before anything was read it does not know the file."""

    offset: int = 0
    identity: Identity | None = None


@dataclass
class _Tail:
    """The end of one file, for all who follow it."""

    path: Path
    clients: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there may be something to read, or to say; then a new one takes its place."""
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[None] | None = None
    latest: tuple[_Place, tuple[_Place, bytes]] | None = None
    """What was read last and from where: who follows live stands at the same place as all others."""

    def wake(self) -> None:
        if self.latest is not None and not self.latest[1][1]:  # there was nothing to read
            self.latest = None
        self.changed.set()
        self.changed = asyncio.Event()

    async def watch(self) -> None:
        """Wake the clients when the file changed, and each `HEARTBEAT_S`."""
        clock = asyncio.get_running_loop().time
        seen, told = self._state(), clock()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            found = self._state()
            if found != seen or clock() >= told + HEARTBEAT_S:
                seen, told = found, clock()
                self.wake()

    def _state(self) -> tuple[Identity, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return (found.st_dev, found.st_ino), found.st_size

    async def read(self, place: _Place) -> tuple[_Place, bytes]:
        """The next messages from `place` on, a chunk at most, and the place after them."""
        async with self.reading:
            if self.latest is None or self.latest[0] != place:
                self.latest = place, await asyncio.to_thread(self._read, place)
            return self.latest[1]

    def _read(self, place: _Place) -> tuple[_Place, bytes]:
        try:
            file = self.path.open("rb")
        except OSError:
            # Nothing yet, or not any more: a client that has read from it must look for the run anew.
            return (place, b"") if place == _Place() else (_Place(), RESET)
        with file:
            found = os.fstat(file.fileno())
            identity = (found.st_dev, found.st_ino)
            if place.identity not in (None, identity) or found.st_size < place.offset:
                return _Place(), RESET
            data = whole_lines(file, place.offset)
        messages = "".join(f"id: {number}\ndata: {text}\n\n" for number, text in numbered(data))
        return _Place(place.offset + len(data), identity), messages.encode()


class Streams:
    """The files that are followed now. Its methods belong to the event loop."""

    def __init__(self, indexes: Indexes) -> None:
        self.indexes = indexes
        self._tails: dict[Path, _Tail] = {}
        self._is_closed = False

    async def follow(self, path: Path, after: int) -> AsyncIterator[bytes]:
        """Messages for the events with an id above `after`, and for those to come, until `close`. The file may be
        missing still. Where it holds no event `after`, a message of the type "reset" goes before all it holds."""
        tail = self._tails.setdefault(path, _Tail(path))
        tail.clients += 1
        task = tail.task = tail.task or asyncio.create_task(tail.watch())
        try:
            offset, is_known = await asyncio.to_thread(self.indexes.of(path).place, after)
            place = _Place(offset)
            yield HEARTBEAT if is_known else RESET
            while not self._is_closed:
                changed = tail.changed
                following, messages = await tail.read(place)
                if following == place:
                    await changed.wait()
                    following, messages = await tail.read(place)
                    messages = messages or HEARTBEAT
                place = following
                if messages:
                    yield messages
        finally:
            tail.clients -= 1
            if not tail.clients:
                task.cancel()
                del self._tails[path]

    def close(self) -> None:
        """End all streams, so that the server need not wait for their clients."""
        self._is_closed = True
        for tail in self._tails.values():
            tail.wake()
