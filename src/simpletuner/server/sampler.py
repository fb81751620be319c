"""The sampler process: `simpletuner sample --serve`, which keeps its model loaded for the next images."""

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
from simpletuner.server.faults import problem_answer
from simpletuner.server.roots import Roots
from simpletuner.server.runs import list_runs
from simpletuner.server.shell import Finished, Shell, end_process, printed_problems
from simpletuner.server.work import TERM_TIMEOUT_S, CommandJob, JobProgress, read_lines, record_line

IDLE_S = 300.0
_LONGEST_EVENT = 2**20
_ENDED_FOR_A_RUN = Problem(
    "the sampler ended because a training run needs its memory",
    remedy="Finished images stay. Sample again once the run has ended.",
)


class SamplerProcess:
    """The server's only sampler process, started by the first sampling job. It serves one job at a time and ends after
    a while without work, when a run starts, and with the server.
    """

    def __init__(self, shell: Shell, idle_s: float = IDLE_S) -> None:
        self._shell = shell
        self._idle_s = idle_s
        self._job_lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._printed: asyncio.Task[str] | None = None
        """Collects what the process prints for people, until it ends."""
        self._job: CommandJob | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def sample(self, job: CommandJob, request: Mapping[str, Any], display_path: Callable[[str], str]) -> None:
        """Generate images for `request`, which holds options of `simpletuner sample` by name, and update `job`. The
        job's result lists the finished images in order; `display_path` converts the process's paths to the page's form.
        """
        async with self._job_lock:
            if self._idle is not None:
                self._idle.cancel()
            self._job = job
            try:
                await self._follow(job, request, display_path)
            except OSError as error:
                job.problems = [problem_answer(Problem(f"the sampler cannot be started ({error.strerror})"))]
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
            await end_process(process, TERM_TIMEOUT_S)

    def _end_soon(self) -> None:
        self._ending = asyncio.ensure_future(self.end())

    async def _started(self) -> asyncio.subprocess.Process:
        process = self._process
        if process is None or process.returncode is not None:
            process = await self._shell.start("sample", "--serve", stdin=asyncio.subprocess.PIPE, limit=_LONGEST_EVENT)
            assert process.stderr is not None
            self._process = process
            self._printed = asyncio.create_task(read_lines(process.stderr, self._record_line))
        return process

    def _record_line(self, line: str) -> None:
        if self._job is not None:
            record_line(line, self._job)

    async def _follow(self, job: CommandJob, request: Mapping[str, Any], display_path: Callable[[str], str]) -> None:
        process = await self._started()
        try:
            await _send(process, {**request, "id": job.id})
            pictures: list[str] = []
            while (event := await _event(process, job.id)) is not None:
                match event["event"]:
                    case "progress":
                        job.progress = JobProgress.model_validate(event)
                    case "picture":
                        pictures = [*pictures, display_path(event["path"])]
                        job.result = {"pictures": pictures}
                    case "done":
                        job.state = "done"
                        return
                    case "failed":
                        job.exit_code = event["exit_code"]
                        job.problems = [
                            problem_answer(Problem(problem["found"], problem["expected"], problem["remedy"]))
                            for problem in event["problems"]
                        ]
                        job.state = "failed"
                        return
            await self._explain_end(job, process)
        except asyncio.CancelledError:
            await self._cancel(process, job.id)
            raise

    async def _cancel(self, process: asyncio.subprocess.Process, job_id: str) -> None:
        """Ask the process to stop a job; end the process if it does not stop in time, for example because it
        is loading a model."""
        try:
            async with asyncio.timeout(TERM_TIMEOUT_S):
                await _send(process, {"cancel": job_id})
                while (event := await _event(process, job_id)) is not None:
                    if event["event"] in ("cancelled", "done", "failed"):
                        return
        except TimeoutError:
            await self.end()

    async def _explain_end(self, job: CommandJob, process: asyncio.subprocess.Process) -> None:
        """Record in `job` why the process ended before the job was done."""
        job.exit_code = await process.wait()
        if job.exit_code == -signal.SIGTERM:  # sent by a starting run: this server would have cancelled the job first
            job.problems = [problem_answer(_ENDED_FOR_A_RUN)]
            job.state = "cancelled"
            return
        assert self._printed is not None
        problems = printed_problems(Finished(job.exit_code, "", await self._printed))
        job.problems = [problem_answer(problem) for problem in problems]
        job.state = "failed"


async def _send(process: asyncio.subprocess.Process, line: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):  # it has ended; reading its output reports that
        process.stdin.write(json.dumps(line).encode() + b"\n")
        await process.stdin.drain()


async def _event(process: asyncio.subprocess.Process, job_id: str) -> dict[str, Any] | None:
    """Return the next event of a job; None if the process has ended."""
    assert process.stdout is not None
    while line := await process.stdout.readline():
        event: dict[str, Any] = json.loads(line)
        if event["id"] == job_id:
            return event
    return None


def run_on_sampler_gpu(roots: Roots) -> str | None:
    """Return a run that is training on the sampler's GPU, if any."""
    other_gpu_runs = {
        (roots.workspace / entry.output_dir).resolve()
        for entry in Queue.of(roots.workspace).entries()
        if entry.state == "running" and _is_on_other_gpus(entry.devices)
    }
    for run in list_runs(roots):
        if run.root not in other_gpu_runs and run.lock().is_held():
            return roots.display_path(run.root)
    return None


def _is_on_other_gpus(devices: str) -> bool:
    """Whether a queue entry's GPUs surely exclude the sampler's. Only plain numbers can be compared: a UUID may name
    the same GPU.
    """
    sampler_gpu, entry_gpus = first_gpu(os.environ), [device.strip() for device in devices.split(",")]
    return sampler_gpu not in entry_gpus and all(device.isdecimal() for device in (sampler_gpu, *entry_gpus))
