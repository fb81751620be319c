"""Run events as server-sent events: the file's events from an id on, then each appended one.

Nothing is queued per client: each stream holds its position in the file and reads on once its client has taken the last
chunk, so a slow client costs no memory. One task per run watches the file, however many clients follow it.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.server.series import EventIndexes, events_in, whole_lines

POLL_EVERY_S = 0.5
HEARTBEAT_S = 15.0
HEARTBEAT = b":\n\n"
RESET = b"event: reset\ndata: {}\n\n"
"""Sent when the file does not continue at the client's position: it was replaced, and the client must start over."""

Identity = tuple[int, int]
"""Device and inode of a file."""


@dataclass(frozen=True)
class _Position:
    """A client's position in the file; `identity` is None before the first read."""

    offset: int = 0
    identity: Identity | None = None


@dataclass
class _Tail:
    """The growing end of one file, shared by all clients that follow it."""

    path: Path
    clients: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there may be new data, or when a heartbeat or the end is due; then replaced by a new event."""
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[None] | None = None
    latest: tuple[_Position, tuple[_Position, bytes]] | None = None
    """The last read: its start, then its end and messages. Clients that follow live are all at the same position,
    so they share it."""

    def wake(self) -> None:
        if self.latest is not None and not self.latest[1][1]:  # the last read found nothing, but now there may be more
            self.latest = None
        self.changed.set()
        self.changed = asyncio.Event()

    async def watch(self) -> None:
        """Wake the clients when the file changes, and every `HEARTBEAT_S`."""
        clock = asyncio.get_running_loop().time
        last_state, woken_at = self._state(), clock()
        while True:
            await asyncio.sleep(POLL_EVERY_S)
            state = self._state()
            if state != last_state or clock() >= woken_at + HEARTBEAT_S:
                last_state, woken_at = state, clock()
                self.wake()

    def _state(self) -> tuple[Identity, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return (status.st_dev, status.st_ino), status.st_size

    async def read(self, position: _Position) -> tuple[_Position, bytes]:
        """Return the position after the next messages, and those messages: at most one chunk from `position` on."""
        async with self.reading:
            if self.latest is None or self.latest[0] != position:
                self.latest = position, await asyncio.to_thread(self._read, position)
            return self.latest[1]

    def _read(self, position: _Position) -> tuple[_Position, bytes]:
        try:
            file = self.path.open("rb")
        except OSError:
            # Not there yet, or deleted: a client that has read from it must load the run again.
            return (position, b"") if position == _Position() else (_Position(), RESET)
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if position.identity not in (None, identity) or status.st_size < position.offset:
                return _Position(), RESET
            data = whole_lines(file, position.offset)
        messages = "".join(f"id: {number}\ndata: {text}\n\n" for number, text in events_in(data))
        return _Position(position.offset + len(data), identity), messages.encode()


class Streams:
    """The files that clients follow. Call its methods inside the event loop."""

    def __init__(self, indexes: EventIndexes) -> None:
        self.indexes = indexes
        self._tails: dict[Path, _Tail] = {}
        self._is_closed = False

    async def follow(self, path: Path, after: int) -> AsyncIterator[bytes]:
        """Yield messages for the events with an id above `after`, then for each new one, until `close`. The file need
        not exist yet. If its last id is below `after`, a message of the type "reset" precedes its whole content."""
        tail = self._tails.setdefault(path, _Tail(path))
        tail.clients += 1
        task = tail.task = tail.task or asyncio.create_task(tail.watch())
        try:
            offset, is_known = await asyncio.to_thread(self.indexes.of(path).position, after)
            position = _Position(offset)
            yield HEARTBEAT if is_known else RESET
            while not self._is_closed:
                changed = tail.changed
                following, messages = await tail.read(position)
                if following == position:
                    await changed.wait()
                    following, messages = await tail.read(position)
                    messages = messages or HEARTBEAT
                position = following
                if messages:
                    yield messages
        finally:
            tail.clients -= 1
            if not tail.clients:
                task.cancel()
                del self._tails[path]

    def close(self) -> None:
        """End all streams, so that the server does not wait for their clients."""
        self._is_closed = True
        for tail in self._tails.values():
            tail.wake()
