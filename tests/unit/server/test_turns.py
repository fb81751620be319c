"""Requests that start commands take turns; what nobody waits for is dropped, what two ask for is done once."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from simpletuner.server.faults import ClientGone
from simpletuner.server.shell import COMMANDS_AT_ONCE, SharedWork, Shell

COUNT_THOSE_THAT_RUN = """
import os, pathlib, time
mine = pathlib.Path(f"{os.getpid()}.runs")
mine.touch()
time.sleep(0.05)
print(len(list(pathlib.Path().glob("*.runs"))))
mine.unlink()
"""


@dataclass(frozen=True)
class Scripts(Shell):
    """Runs Python's own commands in place of ours."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        return [*super().command(())[:1], "-S", "-c", *arguments]


def request_of(*, is_gone: bool) -> Request:
    """A request whose client is there, or went away."""

    async def receive() -> Any:
        if is_gone:
            return {"type": "http.disconnect"}
        return await asyncio.Event().wait()

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def test_commands_take_turns(tmp_path: Path) -> None:
    async def all_at_once() -> list[int]:
        shell = Scripts(tmp_path)
        finished = await asyncio.gather(*(shell.run(COUNT_THOSE_THAT_RUN) for _ in range(2 * COMMANDS_AT_ONCE)))
        return [int(one.out) for one in finished]

    assert max(asyncio.run(all_at_once())) <= COMMANDS_AT_ONCE


def test_checks_have_turns_of_their_own(tmp_path: Path) -> None:
    async def beside_others() -> int:
        shell = Scripts(tmp_path)
        for _ in range(COMMANDS_AT_ONCE):
            await shell.slots.acquire()
        finished = await asyncio.wait_for(shell.run("print(1)", slots=asyncio.Semaphore(1)), 10)
        return finished.exit_code

    assert asyncio.run(beside_others()) == 0


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_command_that_waits_is_dropped_when_its_client_goes_away(tmp_path: Path, is_gone: bool) -> None:
    async def wait_for_a_turn() -> int:
        turns = asyncio.Semaphore(1)
        shell = Scripts(tmp_path)
        await turns.acquire()
        waiting = asyncio.create_task(shell.run("open('ran', 'w')", slots=turns, request=request_of(is_gone=is_gone)))
        if not is_gone:
            await asyncio.sleep(0)
            turns.release()
        with contextlib.suppress(ClientGone):
            return (await asyncio.wait_for(waiting, 10)).exit_code
        turns.release()
        assert not turns.locked()  # the turn that it did not take is free
        return -1

    assert asyncio.run(wait_for_a_turn()) == (-1 if is_gone else 0)
    assert (tmp_path / "ran").exists() is not is_gone


def test_what_two_ask_for_is_done_once_and_ends_with_the_last_of_them() -> None:
    begun = ended = 0

    async def work() -> str:
        nonlocal begun, ended
        begun += 1
        try:
            await asyncio.sleep(60)
        finally:
            ended += 1
        return "never"

    async def ask() -> None:
        shared = SharedWork()
        one, other = (asyncio.create_task(shared.of("same", work)) for _ in range(2))
        await asyncio.sleep(0.01)
        one.cancel()
        await asyncio.wait({one})
        assert (begun, ended) == (1, 0)
        other.cancel()
        await asyncio.wait({other})
        assert (begun, ended) == (1, 1)

    asyncio.run(ask())


def test_what_is_asked_for_again_later_is_done_again() -> None:
    answers = iter(range(10))

    async def work() -> int:
        await asyncio.sleep(0)
        return next(answers)

    async def ask() -> list[int]:
        shared = SharedWork()
        together = await asyncio.gather(shared.of("a", work), shared.of("a", work), shared.of("b", work))
        return [*together, await shared.of("a", work)]

    assert asyncio.run(ask()) == [0, 0, 1, 2]


def test_what_fails_fails_for_all_who_asked() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        raise ValueError("wrong")

    async def ask() -> list[object]:
        shared = SharedWork()
        return await asyncio.gather(shared.of("a", work), shared.of("a", work), return_exceptions=True)

    assert [str(error) for error in asyncio.run(ask())] == ["wrong", "wrong"]
