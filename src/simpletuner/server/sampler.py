"""The process that draws: `simpletuner sample --serve`, which keeps its model for the next pictures."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from simpletuner.base.errors import Problem
from simpletuner.runs.queue import Queue
from simpletuner.runs.samplers import first_gpu
from simpletuner.server.faults import answered
from simpletuner.server.roots import Roots
from simpletuner.server.runs import found_runs
from simpletuner.server.shell import Finished, Shell, end, problems_told
from simpletuner.server.work import PATIENCE_S, CommandJob, JobProgress, read_lines, take_line

IDLE_S = 300.0
_LONGEST_EVENT = 2**20
_GAVE_WAY = Problem(
    "the sampler gave way to a training run, which takes its memory",
    remedy="What was drawn stays. Draw again once the run has ended.",
)


class SamplerProcess:
    """One process for the whole server, started when the first pictures are wanted. It draws for one job at a time and
    ends when it was idle for a while, when a run starts, and with the server.
    """

    def __init__(self, shell: Shell, idle_s: float = IDLE_S) -> None:
        self._shell = shell
        self._idle_s = idle_s
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._printed: asyncio.Task[str] | None = None
        """What the process prints for people, up to its end."""
        self._job: CommandJob | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def draw(self, job: CommandJob, request: Mapping[str, Any], shown: Callable[[str], str]) -> None:
        """Draw what `request` asks for, options of `simpletuner sample` by name. `job` is kept up to date: its result
        has the pictures that are there, in their order, each by the path that `shown` makes of the process's own.
        """
        async with self._turn:
            if self._idle is not None:
                self._idle.cancel()
            self._job = job
            try:
                await self._follow(job, request, shown)
            except OSError as error:
                job.problems = [answered(Problem(f"the sampler cannot be started ({error.strerror})"))]
                job.state = "failed"
            finally:
                self._job = None
                if self._process is not None:
                    self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._end_soon)

    async def end(self) -> None:
        """End the process and free its memory."""
        process, self._process = self._process, None
        if self._idle is not None:
            self._idle.cancel()
        if process is not None:
            await end(process, PATIENCE_S)

    def _end_soon(self) -> None:
        self._ending = asyncio.ensure_future(self.end())

    async def _started(self) -> asyncio.subprocess.Process:
        process = self._process
        if process is None or process.returncode is not None:
            process = await self._shell.start("sample", "--serve", stdin=asyncio.subprocess.PIPE, limit=_LONGEST_EVENT)
            assert process.stderr is not None
            self._process = process
            self._printed = asyncio.create_task(read_lines(process.stderr, self._note))
        return process

    def _note(self, line: str) -> None:
        if self._job is not None:
            take_line(line, self._job)

    async def _follow(self, job: CommandJob, request: Mapping[str, Any], shown: Callable[[str], str]) -> None:
        process = await self._started()
        try:
            await _send(process, {**request, "id": job.id})
            pictures: list[str] = []
            while (event := await _event(process, job.id)) is not None:
                match event["event"]:
                    case "progress":
                        job.progress = JobProgress.model_validate(event)
                    case "picture":
                        pictures = [*pictures, shown(event["path"])]
                        job.result = {"pictures": pictures}
                    case "done":
                        job.state = "done"
                        return
                    case "failed":
                        job.exit_code = event["exit_code"]
                        job.problems = [
                            answered(Problem(one["found"], one["expected"], one["remedy"])) for one in event["problems"]
                        ]
                        job.state = "failed"
                        return
            await self._explain_end(job, process)
        except asyncio.CancelledError:
            await self._cancel(process, job.id)
            raise

    async def _cancel(self, process: asyncio.subprocess.Process, job_id: str) -> None:
        """Have the process stop drawing for a job. One that does not within a while, since it loads, is ended."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await _send(process, {"cancel": job_id})
                while (event := await _event(process, job_id)) is not None:
                    if event["event"] in ("cancelled", "done", "failed"):
                        return
        except TimeoutError:
            await self.end()

    async def _explain_end(self, job: CommandJob, process: asyncio.subprocess.Process) -> None:
        """Say in `job` why the process ended before it was done."""
        job.exit_code = await process.wait()
        if job.exit_code == -signal.SIGTERM:  # not by us: that job would be cancelled
            job.problems = [answered(_GAVE_WAY)]
            job.state = "cancelled"
            return
        assert self._printed is not None
        told = problems_told(Finished(job.exit_code, "", await self._printed))
        job.problems = [answered(problem) for problem in told]
        job.state = "failed"


async def _send(process: asyncio.subprocess.Process, line: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):  # it has ended, which its output tells
        process.stdin.write(json.dumps(line).encode() + b"\n")
        await process.stdin.drain()


async def _event(process: asyncio.subprocess.Process, job_id: str) -> dict[str, Any] | None:
    """The next event of a job; None where the process has ended."""
    assert process.stdout is not None
    while line := await process.stdout.readline():
        event: dict[str, Any] = json.loads(line)
        if event["id"] == job_id:
            return event
    return None


def run_in_the_way(roots: Roots) -> str | None:
    """A run that is training on the GPU that draws."""
    elsewhere = {
        (roots.workspace / entry.output_dir).resolve()
        for entry in Queue.of(roots.workspace).entries()
        if entry.state == "running" and _is_elsewhere(entry.devices)
    }
    for run in found_runs(roots):
        if run.root not in elsewhere and run.lock().is_held():
            return roots.shown(run.root)
    return None


def _is_elsewhere(devices: str) -> bool:
    """Whether GPUs of a queue's entry are others than the one that draws. What is named by more than numbers may be
    the same.
    """
    mine, others = first_gpu(os.environ), [device.strip() for device in devices.split(",")]
    return mine not in others and all(device.isdecimal() for device in (mine, *others))
