"""`simpletuner train` as two processes: what listens, and what comes of a process that dies, stops or fails."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace
from tests.recipes.processes import TIMEOUT_S, children, ended, listening, until

from simpletuner.base.errors import RanksError, Stopped
from simpletuner.runs.checkpoints import steps
from simpletuner.runs.status import status_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TWO = ("--num_processes=2", "--gradient_accumulation_steps=1", "--distributed_timeout_s=6")
LONG = ("--max_train_steps=4000", "--checkpoint_step_interval=20")


@contextlib.contextmanager
def started(place: Workplace, *flags: str, command: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """`simpletuner train FLAGS` as a process; what is left of it at the end is ended."""
    place.write()
    words = command or (sys.executable, "-P", "-m", "simpletuner")
    process = subprocess.Popen(
        [*words, "train", *flags], cwd=place.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    ranks: list[int] = []
    try:
        until(lambda: len(children(process.pid)) == 2, process)
        ranks = children(process.pid)
        yield process
    finally:
        for pid in (process.pid, *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def steps_taken(place: Workplace) -> int:
    return len(place.events("step"))


LOOPBACK = {"0100007F"}


def test_two_processes_listen_on_loopback_and_end_like_one_however_they_are_interrupted(
    workplace: Workplace, uninterrupted: Workplace
) -> None:
    place = workplace
    run = place.run()
    with started(place, *TWO) as process:
        until(lambda: any(event["phase"] == "text" for event in place.events("phase")), process)
        assert listening([process.pid, *children(process.pid)]) == LOOPBACK
        assert status_of(run).pid == children(process.pid)[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == Stopped.exit_code
        assert process.communicate()[1].endswith("Run the same command again to resume.\n")
    assert (status_of(run).state, status_of(run).saved) == ("stopped", None)
    with started(place, *TWO) as process:  # killed while it loads the model
        began = len(place.events("phase"))
        until(lambda: any(e["phase"] == "load" for e in place.events("phase")[began:]), process)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        code, last = ended(process)
        assert code == RanksError.exit_code
        assert last.startswith("rank 1 was killed by signal 9 (SIGKILL).")
    done = place.train_apart(*TWO)
    assert done.returncode == 0, done.stderr
    assert place.losses() == uninterrupted.losses()
    ours, theirs = (load_file(each.run().lora) for each in (place, uninterrupted))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = place.train_apart(*TWO)
    assert "This run is finished: 3 steps" in again.stdout


def test_a_rank_that_is_killed_in_training_is_named_and_the_next_start_goes_on(cached_workplace: Workplace) -> None:
    place = cached_workplace
    with started(place, *TWO, *LONG) as process:
        until(lambda: bool(steps(place.run())) and steps_taken(place) > 20, process)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        code, last = ended(process)
    assert code == RanksError.exit_code
    assert last.startswith("rank 1 was killed by signal 9 (SIGKILL).")
    status = status_of(place.run())
    assert (status.state, status.exit_code, status.error) == ("failed", code, last)
    saved = steps(place.run())[-1]
    assert saved >= status.step - 20
    with started(place, *TWO, *LONG) as process:
        taken = steps_taken(place)
        until(lambda: steps_taken(place) > taken, process)
        assert place.events("run")[-1]["resumed_from"] == saved
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == Stopped.exit_code
    status = status_of(place.run())
    assert (status.state, status.saved) == ("stopped", status.step)
    with started(place, *TWO, *LONG) as process:
        until(lambda: len(place.events("run")) == 3, process)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        code, last = ended(process)
    assert code == RanksError.exit_code
    assert last.startswith("rank 0 was killed by signal 9 (SIGKILL).")
    assert status_of(place.run()).state == "killed"


def test_a_rank_that_stops_answering_is_named_within_the_timeout(cached_workplace: Workplace) -> None:
    place = cached_workplace
    with started(place, *TWO, *LONG) as process:
        until(lambda: bool(steps_taken(place)), process)
        began = time.monotonic()
        os.kill(children(process.pid)[1], signal.SIGSTOP)
        code, last = ended(process)
    assert code == RanksError.exit_code
    assert last.startswith(("rank 1 does not answer", "rank 1 sent no heartbeat for 6 s"))
    assert time.monotonic() - began < 30
    assert place.events("error")[-1]["text"] == last


def test_an_error_of_rank_1_alone_is_rank_0s_too(cached_workplace: Workplace) -> None:
    """And nobody waits for it for the timeout."""
    place = cached_workplace
    (place.folder / "patches").mkdir()
    (place.folder / "patches" / "sitecustomize.py").write_text(
        """
import os

if os.environ.get("RANK") == "1":
    from simpletuner.base.errors import DataError
    from simpletuner.train import caches

    def fail(*_, **__):
        raise DataError.of("the images are gone")

    caches.fill_caches = fail
"""
    )
    where = os.pathsep.join(filter(None, [str(place.folder / "patches"), os.environ.get("PYTHONPATH")]))
    place.write()
    done = place.apart("env", f"PYTHONPATH={where}", sys.executable, "-P", "-m", "simpletuner", "train", *TWO)
    assert done.returncode == 3, done.stderr
    assert done.stderr == "rank 1: the images are gone.\n"
    assert status_of(place.run()).error == "rank 1: the images are gone."


def test_under_torchrun_our_processes_listen_on_loopback(cached_workplace: Workplace) -> None:
    place = cached_workplace
    torchrun = (sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    place.write()
    with started(place, *TWO[1:], *LONG, command=(*torchrun, "-m", "simpletuner")) as process:
        until(lambda: bool(steps_taken(place)), process)
        assert listening(children(process.pid)) == LOOPBACK
        assert place.run().lock().pid() in children(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(TIMEOUT_S)
    assert status_of(place.run()).state == "stopped"


def test_more_processes_than_gpus_are_refused_before_anything_starts(workplace: Workplace) -> None:
    (workplace.folder / "nvidia-smi").write_text(
        "#!/bin/sh\nfor i in 0 1; do echo $i, NVIDIA H100, 570.86.15, 81559, 0, 0; done\n"
    )
    (workplace.folder / "nvidia-smi").chmod(0o755)
    workplace.write()
    path = f"PATH={workplace.folder}:{os.environ['PATH']}"
    done = workplace.apart("env", path, sys.executable, "-P", "-m", "simpletuner", "train", "--num_processes=3")
    assert done.returncode == 2
    assert done.stderr == (
        "num_processes = 3 with 2 visible GPUs: expected at most one process on each GPU. "
        "Give --num_processes=2, or make more GPUs visible with CUDA_VISIBLE_DEVICES.\n"
    )
    assert not workplace.run().root.exists()


def test_run_start_stop_and_delete_know_the_processes(cached_workplace: Workplace) -> None:
    place = cached_workplace
    place.write()
    run = place.run()

    def typed(*words: str) -> Any:
        done = place.apart(sys.executable, "-P", "-m", "simpletuner", "run", *words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    started = typed("start", *TWO, *LONG)
    try:
        ranks = children(started["pid"])
        assert typed("show", "output/run")["pid"] == ranks[0]
        refused = place.apart(sys.executable, "-P", "-m", "simpletuner", "run", "delete", "output/run", "--yes")
        assert refused.returncode == 6
        until(lambda: bool(steps_taken(place)))
        assert typed("save", "output/run", "--wait")["done"].startswith("saved output/run/checkpoints/step-")
        stopped = typed("stop", "output/run", "--wait")
        assert (stopped["state"], stopped["saved"]) == ("stopped", stopped["step"])
        assert not any(Path(f"/proc/{pid}/exe").exists() for pid in ranks)
        typed("start", "--no-wait", *TWO, *LONG)
        typed("stop", "output/run")  # while it starts
        until(lambda: not run.lock().is_held() and not run.starting_lock().is_held())
        assert status_of(run).state == "stopped"
        typed("delete", "output/run", "--yes")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started["pid"], signal.SIGKILL)
