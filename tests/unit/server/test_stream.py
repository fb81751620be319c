"""Events as they come: replayed from an id, followed, one look at the file for all."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from simpletuner.runs.events import EventLog, StepEvent
from simpletuner.server import stream
from simpletuner.server.series import CHUNK_BYTES, EventIndexes
from simpletuner.server.stream import HEARTBEAT, RESET, Streams


def step(number: int, loss: float = 0.5) -> StepEvent:
    return StepEvent(step=number, epoch=0, loss=loss, lr=1e-4, grad_norm=1.0, seconds=0.1, memory_gib=2.5)


def messages(sent: bytes) -> list[tuple[int, Any]]:
    """Ids and data, as a browser reads them."""
    found = []
    for block in sent.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "id" in fields:
            found.append((int(fields["id"]), json.loads(fields["data"], parse_constant=pytest.fail)))
    return found


async def until(follow: AsyncIterator[bytes], last_id: int) -> bytes:
    """What is sent up to the event of that id."""
    sent = b""
    async for part in follow:
        sent += part
        if any(number == last_id for number, _ in messages(sent)):
            return sent
    raise AssertionError(f"ended before {last_id}: {sent!r}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "POLL_EVERY_S", 0.02)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def soon() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(soon())


def test_it_replays_after_an_id_and_goes_on(path: Path) -> None:
    async def work() -> None:
        streams = Streams(EventIndexes())
        with EventLog(path) as log:
            for number in range(1, 6):
                log.emit(step(number))
            follow = streams.follow(path, after=3)
            sent = await until(follow, 5)
            assert [number for number, _ in messages(sent)] == [4, 5]
            lines = path.read_text().splitlines()
            assert f"id: 4\ndata: {lines[3]}\n\n".encode() in sent
            log.emit(step(6))
            log.emit(step(7))
            assert [number for number, _ in messages(await until(follow, 7))] == [6, 7]
        await follow.aclose()

    run(work())


def test_a_run_may_begin_after_its_clients_and_a_torn_line_waits(path: Path) -> None:
    async def work() -> None:
        streams = Streams(EventIndexes())
        follow = streams.follow(path, after=0)
        assert await anext(follow) == HEARTBEAT
        waiting = asyncio.create_task(until(follow, 2))
        await asyncio.sleep(0.1)
        with EventLog(path) as log:
            log.emit(step(1))
            log.emit(step(2))
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])
        await asyncio.sleep(0.1)
        assert not waiting.done()
        with path.open("ab") as file:
            file.write(whole[-5:])
        assert [number for number, _ in messages(await waiting)] == [1, 2]
        await follow.aclose()

    run(work())


def test_a_long_file_comes_in_pieces_that_fit_together(path: Path) -> None:
    with EventLog(path) as log:
        for number in range(1, 4001):
            log.emit(step(number))

    async def work() -> None:
        follow = Streams(EventIndexes()).follow(path, after=10)
        parts = []
        async for part in follow:
            parts.append(part)
            if b'"id": 4000,' in part:
                break
        await follow.aclose()
        assert max(map(len, parts)) < 2 * CHUNK_BYTES
        assert [number for number, _ in messages(b"".join(parts))] == list(range(11, 4001))

    run(work())


def test_what_cannot_be_sent_as_it_is_is_mended_or_left_out(path: Path) -> None:
    with EventLog(path) as log:
        log.emit(step(1, loss=float("nan")))
    head = '{"v": 1, "time": "", "attempt": 1, "type": "notice", '
    with path.open("ab") as file:
        file.write(f'{head}"text": "cr",\r "id": 2}}\r\n'.encode())
        file.write(b"{ damaged\n\n")
        file.write(f'{head}"text": "a\u2028b", "id": 3}}\n'.encode())

    async def work() -> None:
        follow = Streams(EventIndexes()).follow(path, after=0)
        sent = await until(follow, 3)
        await follow.aclose()
        (one, first), (two, second), (three, third) = messages(sent)
        assert (one, two, three) == (1, 2, 3)
        assert first["loss"] is None
        assert second["text"] == "cr"
        assert third["text"] == "a\u2028b"
        assert b"\r" not in sent

    run(work())


def test_a_replaced_file_is_announced(path: Path) -> None:
    async def work() -> None:
        streams = Streams(EventIndexes())
        with EventLog(path) as log:
            for number in range(1, 4):
                log.emit(step(number))
        follow = streams.follow(path, after=3)
        assert await anext(follow) == HEARTBEAT
        waiting = asyncio.create_task(until(follow, 1))
        await asyncio.sleep(0.1)
        path.unlink()
        with EventLog(path) as log:
            log.emit(step(1))
        sent = await waiting
        assert sent.index(RESET) < sent.index(b"id: 1\n")
        await follow.aclose()
        # A client that was away meanwhile learns it at once.
        late = streams.follow(path, after=3)
        assert await anext(late) == RESET
        assert [number for number, _ in messages(await until(late, 1))] == [1]
        await late.aclose()

    run(work())


def test_all_clients_share_one_look_and_one_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    plainly = stream.whole_lines
    monkeypatch.setattr(stream, "whole_lines", lambda file, offset: reads.append(offset) or plainly(file, offset))

    async def work() -> None:
        streams = Streams(EventIndexes())
        with EventLog(path) as log:
            log.emit(step(1))
            follows = [streams.follow(path, after=0) for _ in range(20)]
            await asyncio.gather(*(until(follow, 1) for follow in follows))
            waiting = [asyncio.create_task(until(follow, 2)) for follow in follows]
            await asyncio.sleep(0.1)
            assert len(asyncio.all_tasks()) == 22  # 20 clients, this and the one that looks
            reads.clear()
            log.emit(step(2))
            sent = await asyncio.gather(*waiting)
        assert all([number for number, _ in messages(one)] == [2] for one in sent)
        assert len(reads) <= 2
        for follow in follows:
            await follow.aclose()
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    run(work())


def test_silence_is_broken_by_heartbeats(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.05)

    async def work() -> None:
        follow = Streams(EventIndexes()).follow(path, after=0)
        assert [await anext(follow) for _ in range(3)] == [HEARTBEAT] * 3
        await follow.aclose()

    run(work())


def test_closing_ends_every_stream(path: Path) -> None:
    async def work() -> None:
        streams = Streams(EventIndexes())
        follow = streams.follow(path, after=0)
        await anext(follow)
        rest = asyncio.create_task(anext(follow, b"end"))
        await asyncio.sleep(0.05)
        streams.close()
        while await rest != b"end":
            rest = asyncio.create_task(anext(follow, b"end"))
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    run(work())
