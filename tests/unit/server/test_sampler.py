"""The process that draws for the page: kept for the next job, ended when it is idle, explained when it dies."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from simpletuner.server.sampler import SamplerProcess
from simpletuner.server.shell import Shell
from simpletuner.server.work import CommandJob, Jobs

SERVE = """
import json, os, signal, sys, time
say = lambda **event: print(json.dumps(event), flush=True)
say(event="ready", id=None)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("die"): sys.exit("all went wrong")
    if request.get("train"): os.kill(os.getpid(), signal.SIGTERM)
    print("a line for people", file=sys.stderr, flush=True)
    if request.get("wait"):
        say(event="progress", id=request["id"], what="generating", done=1, total=9)
        continue
    if "cancel" in request:
        say(event="cancelled", id=request["cancel"])
        continue
    for number in range(2):
        say(event="picture", id=request["id"], path=f"samples/{os.getpid()}-{number}.png", prompt="ü" * 50000)
    say(event="done", id=request["id"])
"""


@dataclass(frozen=True)
class InPlaceOfSample(Shell):
    """Runs `SERVE` where `simpletuner sample --serve` is asked for."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        assert list(arguments) == ["sample", "--serve"]
        return [*super().command(())[:1], "-c", SERVE]


async def drawn(jobs: Jobs, sampler: SamplerProcess, **request: object) -> CommandJob:
    job = jobs.begin("sample", lambda job: sampler.sample(job, request, lambda path: path))
    while job.state == "running":
        await asyncio.sleep(0.01)
    return job


def process_of(job: CommandJob) -> int:
    return int(job.result["pictures"][0].removeprefix("samples/").partition("-")[0])


def test_one_process_draws_for_all_jobs_until_it_was_idle(tmp_path: Path) -> None:
    async def follow() -> None:
        shell = InPlaceOfSample(tmp_path)
        jobs, sampler = Jobs(shell), SamplerProcess(shell, idle_s=0.05)
        job, other = await asyncio.gather(drawn(jobs, sampler), drawn(jobs, sampler))
        assert (job.state, len(job.result["pictures"]), job.lines) == ("done", 2, ["a line for people"])
        assert process_of(other) == process_of(job)
        while Path(f"/proc/{process_of(job)}").exists():
            await asyncio.sleep(0.01)
        assert process_of(await drawn(jobs, sampler)) != process_of(job)
        await sampler.end()

    asyncio.run(follow())


@pytest.mark.parametrize(
    ("request_key", "state", "words"),
    [("die", "failed", "all went wrong"), ("train", "cancelled", "the sampler ended because a training run")],
)
def test_a_sampler_that_ends_is_explained_and_replaced(
    tmp_path: Path, request_key: str, state: str, words: str
) -> None:
    async def follow() -> None:
        shell = InPlaceOfSample(tmp_path)
        jobs, sampler = Jobs(shell), SamplerProcess(shell)
        job = await drawn(jobs, sampler, **{request_key: True})
        assert (job.state, len(job.problems)) == (state, 1)
        assert words in job.problems[0].found
        assert (await drawn(jobs, sampler)).state == "done"
        await sampler.end()

    asyncio.run(follow())


def test_a_cancelled_job_leaves_the_process_to_the_next(tmp_path: Path) -> None:
    async def follow() -> None:
        shell = InPlaceOfSample(tmp_path)
        jobs, sampler = Jobs(shell), SamplerProcess(shell)
        before = await drawn(jobs, sampler)
        job = jobs.begin("sample", lambda job: sampler.sample(job, {"wait": True}, str))
        while job.progress is None:
            await asyncio.sleep(0.01)
        assert (await jobs.cancel(job.id)).state == "cancelled"
        assert process_of(await drawn(jobs, sampler)) == process_of(before)
        await sampler.end()

    asyncio.run(follow())
