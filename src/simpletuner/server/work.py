"""Jobs: commands that take longer than a request, followed while they run. They end with the server."""

import asyncio
import codecs
import json
import secrets
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel

from simpletuner.base.errors import Problem, UserError
from simpletuner.server.faults import Fault, ProblemAnswer, answered
from simpletuner.server.shell import Finished, Shell, end, problems_told

LINES_KEPT = 50
LONGEST_LINE = 2000
JOBS_KEPT = 10
"""Finished ones, with their results; the oldest are forgotten."""
RUNNING_AT_MOST = 8
PATIENCE_S = 5.0
"""Between asking a cancelled command to stop and ending it."""
_CHUNK = 65536

Kind = Literal["scan", "cache", "duplicates", "sample"]
JobState = Literal["running", "done", "failed", "cancelled"]


class JobProgress(BaseModel):
    """How far it is."""

    what: str
    done: int
    total: int


class CommandJob(BaseModel):
    """A command and what came of it. Kept up to date while the command runs."""

    id: str
    kind: Kind
    state: JobState = "running"
    exit_code: int | None = None
    progress: JobProgress | None = None
    lines: list[str] = []
    """The last lines that it printed for people."""
    result: Any = None
    """What the command printed as JSON, once it is done; of pictures that are drawn, those that are there so far."""
    problems: list[ProblemAnswer] = []
    """Why it failed, or was cancelled by something else than its own client."""


def from_json(text: str) -> Any:
    """The JSON value in `text`; null stands for numbers that JSON does not know."""
    return json.loads(text, parse_constant=lambda _: None)


class Jobs:
    """All jobs of this server."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._jobs: dict[str, CommandJob] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, kind: Kind, arguments: Sequence[str], result: Callable[[str], Any] = from_json) -> CommandJob:
        """Start `simpletuner ARGUMENTS` and follow it. `result` makes the job's result of what a successful command
        printed; it may raise a UserError, which then fails the job. Called inside the event loop.

        Raises:
            Fault: 429, too many are running.
        """
        return self.begin(kind, partial(self._follow, arguments=arguments, result=result))

    def begin(self, kind: Kind, work: Callable[[CommandJob], Coroutine[None, None, None]]) -> CommandJob:
        """Start `work`, which keeps the job up to date until it ends. Called inside the event loop.

        Raises:
            Fault: 429, too many are running.
        """
        if len(self._tasks) >= RUNNING_AT_MOST:
            raise Fault.of(429, f"{len(self._tasks)} jobs are running", remedy="Wait for one of them, or cancel it.")
        job = CommandJob(id=secrets.token_hex(8), kind=kind)
        self._jobs[job.id] = job
        finished = [known.id for known in self._jobs.values() if known.state != "running"]
        for forgotten in finished[:-JOBS_KEPT]:
            del self._jobs[forgotten]
        task = asyncio.create_task(work(job))
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))
        return job

    def job(self, job_id: str) -> CommandJob:
        """The job of that id.

        Raises:
            Fault: 404.
        """
        if job_id not in self._jobs:
            raise Fault.of(404, "no such job", remedy="Jobs end with the server: start it again.")
        return self._jobs[job_id]

    async def cancel(self, job_id: str) -> CommandJob:
        """Stop a job and wait until its command is gone. One that ended stays as it is.

        Raises:
            Fault: 404.
        """
        job = self.job(job_id)
        task = self._tasks.get(job_id)
        if task is not None:
            if job.state == "running":
                job.state = "cancelled"
            task.cancel()
            await asyncio.wait({task})
        return job

    async def close(self) -> None:
        """Cancel all that still run."""
        await asyncio.gather(*(self.cancel(job_id) for job_id in list(self._tasks)))

    async def _follow(self, job: CommandJob, arguments: Sequence[str], result: Callable[[str], Any]) -> None:
        try:
            process = await self._shell.start(*arguments)
        except OSError as error:
            job.problems = [answered(Problem(f"the command cannot be started ({error.strerror})"))]
            job.state = "failed"
            return
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            out, err, exit_code = await asyncio.gather(
                process.stdout.read(), read_lines(process.stderr, partial(take_line, job=job)), process.wait()
            )
        finally:
            await end(process, PATIENCE_S)
            job.exit_code = process.returncode
        try:
            if exit_code == 0:
                job.result = result(out.decode(errors="replace"))
                job.state = "done"
                return
            problems: Sequence[Problem] = problems_told(Finished(exit_code, "", err))
        except UserError as error:
            problems = error.problems
        except ValueError:
            problems = [Problem("the command's answer cannot be read")]
        job.problems = [answered(problem) for problem in problems]
        job.state = "failed"


async def read_lines(stream: asyncio.StreamReader, take: Callable[[str], None]) -> str:
    """Call `take` with each line as it comes; returns the last part of the whole."""
    whole = rest = ""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while chunk := await stream.read(_CHUNK):
        text = decoder.decode(chunk)
        *lines, rest = (rest + text).replace("\r", "\n").split("\n")
        for line in lines:
            take(line)
        whole = (whole + text)[-_CHUNK:]
        rest = rest[-LONGEST_LINE:]
    take(rest)
    return whole


def take_line(line: str, job: CommandJob) -> None:
    """Put a line that a command printed into its job: progress, or a line for people."""
    if line.startswith("{"):
        progress = _progress(line)
        if progress is not None:
            job.progress = progress
            return
    if line.strip():
        job.lines = [*job.lines, line[:LONGEST_LINE]][-LINES_KEPT:]


def _progress(line: str) -> JobProgress | None:
    """What a line of `--progress` says: {"what", "done", "total"}."""
    try:
        return JobProgress.model_validate_json(line)
    except ValueError:
        return None
