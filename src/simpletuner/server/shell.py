"""Run the CLI's commands from the server: arguments are passed as a list, never through a shell."""

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
"""Short commands that run at once. Checks, plans and jobs have limits of their own."""
DISCONNECT_POLL_S = 0.25
"""Interval at which a waiting request checks whether its client is still connected."""

_PROBLEM_COUNT = re.compile(r"\d+ problems( .*)?:")

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Finished:
    """Exit code and output of a command that ended."""

    exit_code: int
    out: str
    err: str


@dataclass(frozen=True)
class Shell:
    """Runs `simpletuner` commands in the workspace. Their configurations may only name paths in the page's folders."""

    workspace: Path
    extra_roots: tuple[Path, ...] = ()
    """The roots besides the workspace."""
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(COMMANDS_AT_ONCE))
    """Limits how many commands `run` starts at once, unless its caller passes other slots."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the whole command line."""
        return [sys.executable, "-P", "-m", "simpletuner", *arguments]

    def environment(self, *extra_roots: Path) -> dict[str, str]:
        """Return a command's environment variables: the server's, since libraries read tokens and settings from them. A
        configuration can read only the `SIMPLETUNER_*` options among them, and may name only paths in the page's
        folders and in `extra_roots`."""
        return {**os.environ, **Reach(self.workspace, self.extra_roots).variable(*extra_roots)}

    async def start(
        self,
        *arguments: str,
        extra_roots: Sequence[Path] = (),
        stdin: int = asyncio.subprocess.DEVNULL,
        limit: int = 2**16,
    ) -> asyncio.subprocess.Process:
        """Start a command with its output in pipes. It leads a new process group: its child processes can be ended with
        it, and a Ctrl-C in the server's terminal reaches the server only.

        Its configuration may also name paths in the folders `extra_roots`. `limit` is the largest number of bytes in a
        line of its output.
        """
        return await asyncio.create_subprocess_exec(
            *self.command(arguments),
            cwd=self.workspace,
            env={**self.environment(*extra_roots), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            process_group=0,
            limit=limit,
        )

    async def run(
        self,
        *arguments: str,
        extra_roots: Sequence[Path] = (),
        slots: asyncio.Semaphore | None = None,
        request: Request | None = None,
    ) -> Finished:
        """Run a command to its end once a slot is free; a cancelled caller ends the command.

        Raises:
            ClientGone: the client of `request` disconnected while it waited for a slot.
        """
        async with _slot(slots or self.slots, request):
            process = await self.start(*arguments, extra_roots=extra_roots)
            try:
                out, err = await process.communicate()
            finally:
                await end_process(process)
        assert process.returncode is not None
        return Finished(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


@contextlib.asynccontextmanager
async def _slot(slots: asyncio.Semaphore, request: Request | None) -> AsyncIterator[None]:
    """Hold one of `slots`, granted first come, first served.

    Raises:
        ClientGone: the client of `request` disconnected while it waited.
    """
    waiting = asyncio.ensure_future(slots.acquire())
    try:
        while not (await asyncio.wait({waiting}, timeout=DISCONNECT_POLL_S))[0]:
            if request is not None and await request.is_disconnected():
                raise ClientGone
        yield
    finally:
        if not waiting.cancel():
            slots.release()


class SharedWork:
    """Runs identical concurrent work once for all its waiters; cancels it when the last waiter leaves."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._waiters: dict[str, int] = {}

    async def of(self, key: str, begin: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        """Return the result of `begin()`, or of the running work with this key."""
        task: asyncio.Task[Answer] = self._tasks.get(key) or asyncio.ensure_future(begin())
        self._tasks[key] = task
        self._waiters[key] = self._waiters.get(key, 0) + 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiters[key] -= 1
            if not self._waiters[key]:
                del self._waiters[key], self._tasks[key]
                task.cancel()
                await asyncio.wait({task})


async def end_process(process: asyncio.subprocess.Process, term_timeout_s: float = 0.0) -> None:
    """End a command and its child processes: SIGTERM if there is a timeout, then SIGKILL. Does nothing if it has
    ended."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if term_timeout_s:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), term_timeout_s)
                return
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def until_disconnect(request: Request, work: Awaitable[Answer]) -> Answer:
    """Return the result of `work`; cancel it, and with it a command that it awaits, when the client disconnects.

    Raises:
        ClientGone: the client disconnected.
    """
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=DISCONNECT_POLL_S)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise ClientGone
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})


def printed_problems(finished: Finished) -> list[Problem]:
    """Parse the problems from the standard error of a failed command: one line each."""
    lines = [line.rstrip() for line in finished.err.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if _PROBLEM_COUNT.fullmatch(line):
            texts = [text.removeprefix("  - ") for text in lines[index + 1 :] if text.startswith("  - ")]
            return [Problem(text) for text in texts]
    if any(line.startswith("Traceback ") for line in lines):
        raised = [line for line in lines if not line.startswith(" ")]
        last = next((line for line in reversed(raised) if not line.startswith("This is a bug")), "")
        return [Problem(f"the command failed: {last}", remedy="This is a bug in simpletuner. Please report it.")]
    if lines:
        return [Problem(lines[-1])]
    return [Problem(f"the command ended with code {finished.exit_code} and printed nothing")]
