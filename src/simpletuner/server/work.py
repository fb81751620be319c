"""Jobs: commands that outlast a request, and their progress. They end with the server."""

import asyncio
import codecs
import json
import secrets
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel

from simpletuner.base.errors import Problem, UserError
from simpletuner.server.faults import Fault, ProblemAnswer, problem_answer
from simpletuner.server.shell import Finished, Shell, end_process, printed_problems

LINES_KEPT = 50
LONGEST_LINE = 2000
JOBS_KEPT = 10
"""Finished jobs that keep their results; older ones are dropped."""
RUNNING_AT_MOST = 8
TERM_TIMEOUT_S = 5.0
"""Time between SIGTERM and SIGKILL for a cancelled command."""
_CHUNK = 65536

JobKind = Literal["scan", "cache", "duplicates", "sample"]
JobState = Literal["running", "done", "failed", "cancelled"]


class JobProgress(BaseModel):
    """A job's progress."""

    what: str
    done: int
    total: int


class CommandJob(BaseModel):
    """A command and its outcome; updated while the command runs."""

    id: str
    kind: JobKind
    state: JobState = "running"
    exit_code: int | None = None
    progress: JobProgress | None = None
    lines: list[str] = []
    """The last lines that the command printed for people."""
    result: Any = None
    """The command's JSON output, once it is done; for sampling, the images generated so far."""
    problems: list[ProblemAnswer] = []
    """Why the job failed, or why something other than its client cancelled it."""


def from_json(text: str) -> Any:
    """Parse JSON; NaN and infinities become None."""
    return json.loads(text, parse_constant=lambda _: None)


class Jobs:
    """The jobs of this server."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._jobs: dict[str, CommandJob] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, kind: JobKind, arguments: Sequence[str], result: Callable[[str], Any] = from_json) -> CommandJob:
        """Start `simpletuner ARGUMENTS` and follow it. `result` turns the output of a successful command into the job's
        result; a UserError that it raises fails the job. Call it inside the event loop.

        Raises:
            Fault: 429, too many jobs are running.
        """
        return self.begin(kind, partial(self._follow, arguments=arguments, result=result))

    def begin(self, kind: JobKind, work: Callable[[CommandJob], Coroutine[None, None, None]]) -> CommandJob:
        """Start `work`, which updates the job until it ends. Call it inside the event loop.

        Raises:
            Fault: 429, too many jobs are running.
        """
        if len(self._tasks) >= RUNNING_AT_MOST:
            raise Fault.of(429, f"{len(self._tasks)} jobs are running", remedy="Wait for one of them, or cancel it.")
        job = CommandJob(id=secrets.token_hex(8), kind=kind)
        self._jobs[job.id] = job
        finished = [known.id for known in self._jobs.values() if known.state != "running"]
        for old_id in finished[:-JOBS_KEPT]:
            del self._jobs[old_id]
        task = asyncio.create_task(work(job))
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))
        return job

    def job(self, job_id: str) -> CommandJob:
        """Return the job with this id.

        Raises:
            Fault: 404, no such job.
        """
        if job_id not in self._jobs:
            raise Fault.of(404, "no such job", remedy="Jobs end with the server: start the job again.")
        return self._jobs[job_id]

    async def cancel(self, job_id: str) -> CommandJob:
        """Stop a job and wait until its command has ended. A finished job does not change.

        Raises:
            Fault: 404, no such job.
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
        """Cancel all running jobs."""
        await asyncio.gather(*(self.cancel(job_id) for job_id in list(self._tasks)))

    async def _follow(self, job: CommandJob, arguments: Sequence[str], result: Callable[[str], Any]) -> None:
        try:
            process = await self._shell.start(*arguments)
        except OSError as error:
            job.problems = [problem_answer(Problem(f"the command cannot be started ({error.strerror})"))]
            job.state = "failed"
            return
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            out, err, exit_code = await asyncio.gather(
                process.stdout.read(), read_lines(process.stderr, partial(record_line, job=job)), process.wait()
            )
        finally:
            await end_process(process, TERM_TIMEOUT_S)
            job.exit_code = process.returncode
        try:
            if exit_code == 0:
                job.result = result(out.decode(errors="replace"))
                job.state = "done"
                return
            problems: Sequence[Problem] = printed_problems(Finished(exit_code, "", err))
        except UserError as error:
            problems = error.problems
        except ValueError:
            problems = [Problem("the command's output cannot be parsed")]
        job.problems = [problem_answer(problem) for problem in problems]
        job.state = "failed"


async def read_lines(stream: asyncio.StreamReader, take: Callable[[str], None]) -> str:
    """Call `take` with each line as it arrives; return the last 64 KiB of the output."""
    tail = partial_line = ""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while chunk := await stream.read(_CHUNK):
        text = decoder.decode(chunk)
        *lines, partial_line = (partial_line + text).replace("\r", "\n").split("\n")
        for line in lines:
            take(line)
        tail = (tail + text)[-_CHUNK:]
        partial_line = partial_line[-LONGEST_LINE:]
    take(partial_line)
    return tail


def record_line(line: str, job: CommandJob) -> None:
    """Record a line that a command printed in its job: progress, or a line for people."""
    if line.startswith("{"):
        progress = _progress(line)
        if progress is not None:
            job.progress = progress
            return
    if line.strip():
        job.lines = [*job.lines, line[:LONGEST_LINE]][-LINES_KEPT:]


def _progress(line: str) -> JobProgress | None:
    """Parse a line of `--progress`: {"what", "done", "total"}; None if it is not one."""
    try:
        return JobProgress.model_validate_json(line)
    except ValueError:
        return None
