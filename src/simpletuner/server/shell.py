"""The shell's commands as the server gives them: arguments in a list, never through a shell."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request

from simpletuner.base.errors import Problem
from simpletuner.server.faults import ClientGone
from simpletuner.server.reach import Reach

COMMANDS_AT_ONCE = 4
"""Short commands, besides checks, plans and jobs, which have turns of their own."""
GONE_EVERY_S = 0.25
"""How often a waiting request looks whether its client is still there."""

_SEVERAL = re.compile(r"\d+ problems .*:")

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    exit_code: int
    out: str
    err: str


@dataclass(frozen=True)
class Shell:
    """Runs `simpletuner WORD …` in the workspace; the configuration it reads is held to the page's folders."""

    workspace: Path
    others: tuple[Path, ...] = ()
    """The other roots."""
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(COMMANDS_AT_ONCE))
    """Of commands that have none of their own."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The whole command line."""
        return [sys.executable, "-P", "-m", "simpletuner", *arguments]

    def environment(self, *also: Path) -> dict[str, str]:
        """A command's environment: the server's, for the tokens and settings of the libraries that train. Of these a
        configuration sees the options `SIMPLETUNER_*` alone, and paths in the page's folders and in `also`."""
        return {**os.environ, **Reach(self.workspace, self.others).variable(*also)}

    async def start(
        self,
        *arguments: str,
        also: Sequence[Path] = (),
        stdin: int = asyncio.subprocess.DEVNULL,
        limit: int = 2**16,
    ) -> asyncio.subprocess.Process:
        """Start a command; its output comes through pipes. It leads a process group of its own, so that what it
        starts can be ended with it, and a Ctrl-C in the server's terminal reaches the server alone.

        Its configuration may name paths in the folders `also` too. `limit` is how many bytes a line of its output may
        have.
        """
        return await asyncio.create_subprocess_exec(
            *self.command(arguments),
            cwd=self.workspace,
            env={**self.environment(*also), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            process_group=0,
            limit=limit,
        )

    async def run(
        self,
        *arguments: str,
        also: Sequence[Path] = (),
        turns: asyncio.Semaphore | None = None,
        request: Request | None = None,
    ) -> Finished:
        """Run a command to its end, once it is its turn. Ends it where the caller is cancelled.

        Raises:
            ClientGone: the client of `request` went away before its turn came.
        """
        async with _turn(turns or self.turns, request):
            process = await self.start(*arguments, also=also)
            try:
                out, err = await process.communicate()
            finally:
                await end(process)
        assert process.returncode is not None
        return Finished(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


@contextlib.asynccontextmanager
async def _turn(turns: asyncio.Semaphore, request: Request | None) -> AsyncIterator[None]:
    """One of `turns`, in the order in which they are asked for.

    Raises:
        ClientGone: the client of `request` went away while it waited.
    """
    waiting = asyncio.ensure_future(turns.acquire())
    try:
        while not (await asyncio.wait({waiting}, timeout=GONE_EVERY_S))[0]:
            if request is not None and await request.is_disconnected():
                raise ClientGone
        yield
    finally:
        if not waiting.cancel():
            turns.release()


class SharedWork:
    """Work that is done once for all who ask for it while it is done; it ends when the last of them goes away."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._askers: dict[str, int] = {}

    async def of(self, key: str, begin: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        """What `begin` gives, or the work of this key that is being done."""
        task: asyncio.Task[Answer] = self._tasks.get(key) or asyncio.ensure_future(begin())
        self._tasks[key] = task
        self._askers[key] = self._askers.get(key, 0) + 1
        try:
            return await asyncio.shield(task)
        finally:
            self._askers[key] -= 1
            if not self._askers[key]:
                del self._askers[key], self._tasks[key]
                task.cancel()
                await asyncio.wait({task})


async def end(process: asyncio.subprocess.Process, patience_s: float = 0.0) -> None:
    """End a command and what it started: TERM where there is patience, then KILL. One that ended is left alone."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if patience_s:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience_s)
                return
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def while_there(request: Request, work: Awaitable[Answer]) -> Answer:
    """What `work` gives. It is cancelled when the client goes away, which ends a command that it waits for."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=GONE_EVERY_S)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise ClientGone
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})


def problems_told(finished: Finished) -> list[Problem]:
    """The problems in what a failed command printed for people: a line each."""
    lines = [line.rstrip() for line in finished.err.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if _SEVERAL.fullmatch(line):
            told = [text.removeprefix("  - ") for text in lines[index + 1 :] if text.startswith("  - ")]
            return [Problem(text) for text in told]
    if any(line.startswith("Traceback ") for line in lines):
        raised = [line for line in lines if not line.startswith(" ")]
        last = next((line for line in reversed(raised) if not line.startswith("This is a bug")), "")
        return [Problem(f"the command failed: {last}", remedy="This is a bug in simpletuner. Please report it.")]
    if lines:
        return [Problem(lines[-1])]
    return [Problem(f"the command ended with code {finished.exit_code} and said nothing")]
