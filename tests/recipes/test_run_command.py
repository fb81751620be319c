"""`simpletuner run` with real runs: they outlive who started them, are stopped, go on, and take their turn."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.recipes.conftest import Workplace

from simpletuner.runs.checkpoints import steps
from simpletuner.runs.queue import Queue
from simpletuner.runs.status import status_of

pytestmark = pytest.mark.slow

LONG = "--max_train_steps=400"


def typed(place: Workplace, *words: str, code: int = 0) -> Any:
    """What a command prints as JSON."""
    place.write()
    done = place.apart(sys.executable, "-P", "-m", "simpletuner", *words, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def until(is_so: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def test_a_run_is_started_watched_and_stopped(workplace: Workplace) -> None:
    workplace.config["checkpoint_step_interval"] = 100
    run = workplace.run()
    started = typed(workplace, "run", "start", LONG)
    assert (started["run"], started["exit_code"]) == ("output/run", None)
    assert os.getsid(started["pid"]) == started["pid"], "it has a session of its own"
    try:
        assert typed(workplace, "run", "show", "output/run")["pid"] == started["pid"]
        again = workplace.apart(sys.executable, "-P", "-m", "simpletuner", "run", "start", LONG)
        assert again.returncode == 6
        assert f"in use by process {started['pid']}" in again.stderr
        refused = workplace.apart(
            sys.executable, "-P", "-m", "simpletuner", "checkpoint", "delete", "output/run", "--all"
        )
        assert refused.returncode == 6
        until(lambda: bool(workplace.events("step")))
        saved = typed(workplace, "run", "save", "output/run", "--wait")
        assert saved["done"].startswith("saved output/run/checkpoints/step-")
        stopped = typed(workplace, "run", "stop", "--wait")
        assert stopped["state"] == "stopped"
        assert stopped["step"] == workplace.events("end")[-1]["step"]
    finally:
        if run.lock().is_held():
            os.kill(started["pid"], signal.SIGKILL)
    assert "the run is saved" in run.console.read_text()
    listed = typed(workplace, "run", "list")["runs"]
    assert [(one["run"], one["state"]) for one in listed] == [("output/run", "stopped")]
    verified = typed(workplace, "checkpoint", "verify")["checkpoints"]
    assert verified
    assert all(one["damage"] is None for one in verified)


def test_a_finished_run_says_so_and_another_setting_is_refused(workplace: Workplace) -> None:
    assert workplace.train("--max_train_steps=1") == 0
    assert typed(workplace, "run", "start", "--max_train_steps=1")["exit_code"] == 0
    refused = workplace.apart(sys.executable, "-P", "-m", "simpletuner", "run", "start", "--lora_rank=8")
    assert refused.returncode == 6
    assert "was trained with other settings: lora_rank" in refused.stderr


def test_the_queue_survives_its_worker_and_keeps_the_configuration(workplace: Workplace) -> None:
    typed(workplace, "run", "queue", "add", LONG, "--output_dir=output/first")
    workplace.config["lora_rank"] = 2
    second = typed(workplace, "run", "start", "--queue", "--max_train_steps=1", "--output_dir=output/second")
    workplace.config["lora_rank"] = 3
    workplace.write()
    assert second["state"] == "waiting"
    queue = Queue.of(workplace.folder)
    until(lambda: bool(workplace.events("step", "first")))
    worker = queue.worker("").pid()
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    until(lambda: not queue.worker("").is_held())
    assert [entry.state for entry in queue.entries()] == ["running", "waiting"]
    assert typed(workplace, "run", "queue")["devices_without_a_worker"] == [""]
    typed(workplace, "run", "queue", "resume")
    typed(workplace, "run", "stop", "output/first", "--wait")
    until(lambda: [entry.state for entry in queue.entries()] == ["stopped", "done"])
    status = status_of(workplace.run("second"))
    assert (status.state, status.step) == ("done", 1)
    assert json.loads(workplace.run("second").config.read_text())["lora_rank"] == 2
    until(lambda: not queue.worker("").is_held())


def test_a_run_of_the_queue_that_is_killed_says_so_and_goes_on_when_it_is_put_there_again(workplace: Workplace) -> None:
    queue = Queue.of(workplace.folder)
    typed(workplace, "run", "queue", "add", LONG)
    until(lambda: bool(workplace.events("checkpoint")))
    (entry,) = queue.entries()
    assert entry.pid is not None
    os.kill(entry.pid, signal.SIGKILL)
    until(lambda: not queue.worker("").is_held())
    (entry,) = queue.entries()
    assert (entry.state, entry.exit_code) == ("failed", 137)
    assert entry.error is not None
    assert entry.error.startswith("ended by signal 9")
    assert typed(workplace, "run", "list")["runs"][0]["state"] == "killed"
    saved = steps(workplace.run())[-1]
    typed(workplace, "run", "queue", "add", f"--max_train_steps={saved + 1}")
    until(lambda: not queue.worker("").is_held())
    assert [entry.state for entry in queue.entries()] == ["failed", "done"]
    assert workplace.events("run")[-1]["resumed_from"] == saved
