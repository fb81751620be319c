"""The shell's commands as the server gives them: arguments in a list, never through a shell."""

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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
        """Start a command; its output comes through pipes."""
        return await asyncio.create_subprocess_exec(
            *self.command(arguments),
            cwd=self.workspace,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *arguments: str) -> Finished:
        """Run a command to its end. Ends it where the caller is cancelled."""
        process = await self.start(*arguments)
        try:
            out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return Finished(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))
