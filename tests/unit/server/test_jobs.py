"""Long commands, followed to their end."""

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from simpletuner.base.errors import Problem, UserError
from simpletuner.config.load import PAGE_ROOTS_VARIABLE
from simpletuner.server.faults import Fault
from simpletuner.server.shell import Finished, Shell, printed_problems
from simpletuner.server.work import LINES_KEPT, RUNNING_AT_MOST, Jobs


@dataclass(frozen=True)
class Python(Shell):
    """Runs Python's own commands in place of ours, to have one of each kind at hand."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        return [*super().command(())[:1], "-c", *arguments]


def followed(folder: Path, code: str) -> Any:
    async def follow() -> Any:
        jobs = Jobs(Python(folder))
        job = jobs.start("scan", [code])
        while job.state == "running":
            await asyncio.sleep(0.01)
        return job

    return asyncio.run(follow())


def until_done(client: TestClient, job: Any) -> Any:
    end = time.monotonic() + 60
    while job["state"] == "running" and time.monotonic() < end:
        time.sleep(0.05)
        job = client.get(f"/api/jobs/{job['id']}").raise_for_status().json()
    return job


def test_a_scan_gives_what_the_shell_prints(client: TestClient, environment: str) -> None:
    started = client.post("/api/jobs/scan", json={"environment": environment})
    assert started.status_code == 202
    done = until_done(client, started.json())
    assert (done["state"], done["exit_code"], done["problems"]) == ("done", 0, [])
    (told,) = done["result"]["sets"]
    assert len(told["samples"]) == 6
    assert done["progress"] == {"what": "set", "done": 6, "total": 6}


def test_a_scan_that_fails_says_why(client: TestClient, workspace: Path, environment: str) -> None:
    (workspace / "config" / environment / "multidatabackend.json").write_text("[{}]")
    failed = until_done(client, client.post("/api/jobs/scan", json={"environment": environment}).json())
    assert (failed["state"], failed["exit_code"], failed["result"]) == ("failed", 2, None)
    assert any("id is missing" in problem["text"] for problem in failed["problems"])


def test_unknown_environments_and_jobs(client: TestClient) -> None:
    assert client.post("/api/jobs/scan", json={"environment": "none"}).status_code == 404
    assert client.get("/api/jobs/none").status_code == 404
    assert client.delete("/api/jobs/none").status_code == 404


def test_lines_and_progress_are_told_apart(tmp_path: Path) -> None:
    code = """
import sys
for number in range(100): print(f"line {number}", file=sys.stderr)
print('{"what": "set", "done": 3, "total": 4}', file=sys.stderr)
print('{"what": "no progress"}', file=sys.stderr)
sys.stderr.write("one\\rtwo, über")
print('{"answer": 1, "rate": Infinity}')
"""
    job = followed(tmp_path, code)
    assert (job.state, job.exit_code, job.result) == ("done", 0, {"answer": 1, "rate": None})
    assert (job.progress.done, job.progress.total) == (3, 4)
    assert len(job.lines) == LINES_KEPT
    assert job.lines[-3:] == ['{"what": "no progress"}', "one", "two, über"]


def test_an_answer_that_is_no_json_fails(tmp_path: Path) -> None:
    job = followed(tmp_path, "print('hello')")
    assert (job.state, job.exit_code) == ("failed", 0)
    assert "cannot be parsed" in job.problems[0].found


def test_a_cancelled_job_ends_with_what_it_started(tmp_path: Path) -> None:
    code = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, file=sys.stderr, flush=True)
child.wait()
"""

    async def cancel() -> tuple[Any, int]:
        jobs = Jobs(Python(tmp_path))
        job = jobs.start("cache", [code])
        while not job.lines:
            await asyncio.sleep(0.01)
        return await jobs.cancel(job.id), int(job.lines[0])

    job, child = asyncio.run(cancel())
    assert (job.state, job.exit_code) == ("cancelled", -15)
    end = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and _state(child) != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return "Z"


def test_jobs_end_with_the_server(tmp_path: Path) -> None:
    async def close() -> Any:
        jobs = Jobs(Python(tmp_path))
        job = jobs.start("cache", ["import time; time.sleep(600)"])
        await asyncio.sleep(0.1)
        await jobs.close()
        return job

    assert asyncio.run(close()).state == "cancelled"


def test_too_many_jobs_are_refused(tmp_path: Path) -> None:
    async def flood() -> int:
        jobs = Jobs(Python(tmp_path))
        for _ in range(RUNNING_AT_MOST):
            jobs.start("scan", ["import time; time.sleep(600)"])
        with pytest.raises(Fault) as refused:
            jobs.start("scan", ["pass"])
        await jobs.close()
        return refused.value.status

    assert asyncio.run(flood()) == 429


def test_problems_are_read_from_what_people_see() -> None:
    several = "A notice.\n2 problems in the configuration:\n  - lora_rank = 0: expected 1.\n  - sede: no such option.\n"
    assert [str(problem) for problem in printed_problems(Finished(2, "", several))] == [
        "lora_rank = 0: expected 1.",
        "sede: no such option.",
    ]
    without_stage = str(UserError(Problem("a fault"), Problem("another")))
    assert without_stage.startswith("2 problems:\n")
    assert [str(problem) for problem in printed_problems(Finished(1, "", without_stage))] == ["a fault.", "another."]
    assert printed_problems(Finished(3, "", "a notice\nno such folder.\n"))[0].found == "no such folder."
    bug = 'Traceback (most recent call last):\n  File "/secret/x.py", line 1\nValueError: 3\nThis is a bug in it.\n'
    (told,) = printed_problems(Finished(1, "", bug))
    assert told.found == "the command failed: ValueError: 3"
    assert printed_problems(Finished(-9, "", ""))[0].found.endswith("-9 and printed nothing")


def test_a_command_gets_no_more_environment_than_the_server(tmp_path: Path) -> None:
    job = followed(tmp_path, "import json, os; print(json.dumps(sorted(os.environ)))")
    told = {PAGE_ROOTS_VARIABLE, "PYTHONUNBUFFERED", "PYTHONIOENCODING", "LC_CTYPE"}
    assert set(job.result) - set(os.environ) <= told
