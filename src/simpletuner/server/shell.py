"""The shell's commands as the server gives them: arguments in a list, never through a shell."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastapi import Request

from simpletuner.base.errors import Problem
from simpletuner.server.faults import ClientGone

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
    """Runs `simpletuner WORD …` in the workspace."""

    workspace: Path

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The whole command line."""
        return [sys.executable, "-P", "-m", "simpletuner", *arguments]

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start a command; its output comes through pipes. It leads a process group of its own, so that what it
        starts can be ended with it, and a Ctrl-C in the server's terminal reaches the server alone."""
        return await asyncio.create_subprocess_exec(
            *self.command(arguments),
            cwd=self.workspace,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            process_group=0,
        )

    async def in_turn(self, turns: asyncio.Semaphore, *arguments: str) -> Finished:
        """The same as `run`, once it is this command's turn."""
        async with turns:
            return await self.run(*arguments)

    async def run(self, *arguments: str) -> Finished:
        """Run a command to its end. Ends it where the caller is cancelled."""
        process = await self.start(*arguments)
        try:
            out, err = await process.communicate()
        finally:
            await end(process)
        assert process.returncode is not None
        return Finished(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


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
