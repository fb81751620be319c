"""Two machines, each a network namespace, joined by a cable that can be cut: the same run, started on both."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace
from tests.recipes.processes import TIMEOUT_S, children, ended, listening, until

from simpletuner.base.errors import RanksError, Stopped
from simpletuner.runs.checkpoints import steps
from simpletuner.runs.status import status_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29517
SILENT_S = 6
FLAGS = (f"--distributed_timeout_s={SILENT_S}", "--gradient_accumulation_steps=1")
OPTIONS = ("--num_machines=2", f"--main_process_ip={ADDRESSES[0]}", f"--main_process_port={PORT}")
LONG = ("--max_train_steps=4000", "--checkpoint_step_interval=5")
LATE_S = 15 + SILENT_S
"""Time for a rank to end by itself before it is killed, and for the other machine to hear of it."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Network:
    """Two network namespaces with a cable between them."""

    def __init__(self) -> None:
        self.names = [f"st{os.getpid()}-{number}" for number in range(2)]

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        peer = ["type", "veth", "peer", "name", "cable", "netns", self.names[1]]
        ip("link", "add", "cable", "netns", self.names[0], *peer)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
        self.set_cable("up")

    def set_cable(self, state: str) -> None:
        for name in self.names:
            ip("-n", name, "link", "set", "cable", state)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    made = Network()
    try:
        try:
            made.make()
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", b"").decode().strip() or error
            pytest.skip(f"network namespaces cannot be made here, which takes root and iproute2: {reason}")
        yield made
    finally:
        made.remove()


@contextlib.contextmanager
def started(
    network: Network, place: Workplace, commands: Sequence[Sequence[str]], environs: Sequence[dict[str, str]] = ({}, {})
) -> Iterator[list[subprocess.Popen[str]]]:
    """One command on each machine, in the same working folder; what is left of them at the end is ended."""
    place.write()
    processes: list[subprocess.Popen[str]] = []
    ranks: set[int] = set()
    try:
        for name, command, environ in zip(network.names, commands, environs, strict=True):
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, sys.executable, "-P", "-m", *command],
                    cwd=place.folder,
                    env={**os.environ, **environ},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in processes:
            until(lambda process=process: bool(children(process.pid)), process)
            ranks |= {*children(process.pid)}
        yield processes
    finally:
        for pid in (*(process.pid for process in processes), *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.wait()
            assert process.stderr is not None
            process.stderr.close()


def trains(*flags: str) -> list[list[str]]:
    """The command on each machine."""
    return [["simpletuner", "train", *OPTIONS, f"--machine_rank={number}", *FLAGS, *flags] for number in range(2)]


def assert_same_run(place: Workplace, other: Workplace) -> None:
    assert place.losses() == other.losses()
    ours, theirs = (load_file(each.run().lora) for each in (place, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_nodes_of_slurm_train_what_one_process_does(
    network: Network, workplace: Workplace, uninterrupted: Workplace
) -> None:
    """To the bit, from filling the caches on. They listen on their addresses in the network alone."""
    slurm = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "10.77.0.[1-2]",
    }
    environs = [{**slurm, "SLURM_NODEID": str(number)} for number in range(2)]
    commands = [["simpletuner", "train", *FLAGS]] * 2
    with started(network, workplace, commands, environs) as machines:
        until(lambda: any(event["phase"] == "text" for event in workplace.events("phase")), machines[0])
        hexadecimal = [bytes(map(int, reversed(address.split(".")))).hex().upper() for address in ADDRESSES]
        assert [listening([each.pid, *children(each.pid)]) for each in machines] == [{each} for each in hexadecimal]
        assert [ended(machine) for machine in machines] == [(0, ""), (0, "")]
    assert_same_run(workplace, uninterrupted)


def test_two_nodes_of_torchrun_train_what_one_process_does(
    network: Network, cached_workplace: Workplace, uninterrupted: Workplace
) -> None:
    nodes = ("--nnodes=2", "--nproc-per-node=1", f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}")
    commands = [
        ["torch.distributed.run", *nodes, f"--node-rank={number}", "-m", "simpletuner", "train", *FLAGS]
        for number in range(2)
    ]
    with started(network, cached_workplace, commands) as machines:
        assert [machine.wait(TIMEOUT_S) for machine in machines] == [0, 0]
    assert_same_run(cached_workplace, uninterrupted)


def test_what_ends_one_machine_is_named_on_both_and_the_next_start_goes_on(
    network: Network, cached_workplace: Workplace
) -> None:
    place = cached_workplace

    def begun(machines: Sequence[subprocess.Popen[str]]) -> None:
        taken, starts = len(place.events("step")), len(place.events("run"))
        until(lambda: len(place.events("step")) > taken + 6, machines[0])
        if starts:
            assert place.events("run")[-1]["resumed_from"] == steps_before[-1]

    steps_before: list[int] = []
    with started(network, place, trains(*LONG)) as machines:
        begun(machines)
        os.kill(children(machines[1].pid)[0], signal.SIGKILL)
        killed = "rank 1 was killed by signal 9 (SIGKILL)."
        for code, last in map(ended, machines):
            assert code == RanksError.exit_code
            assert last.startswith(killed)
    assert status_of(place.run()).error.startswith(killed)
    steps_before = steps(place.run())

    with started(network, place, trains(*LONG)) as machines:
        begun(machines)
        network.set_cable("down")
        cut_at = time.monotonic()
        endings = [ended(machine) for machine in machines]
        assert time.monotonic() - cut_at < 2 * LATE_S
        network.set_cable("up")
    assert [code for code, _ in endings] == [RanksError.exit_code] * 2
    assert endings[0][1].startswith("rank 1 does not answer")
    assert endings[1][1].startswith("rank 0 does not answer")
    status = status_of(place.run())
    assert (status.state, status.error) == ("failed", endings[0][1])
    steps_before = steps(place.run())
    assert steps_before[-1] >= status.step - 5

    with started(network, place, trains(*LONG)) as machines:  # as a cluster does that takes its nodes back
        begun(machines)
        for machine in reversed(machines):
            for pid in (*children(machine.pid), machine.pid):
                os.kill(pid, signal.SIGTERM)
            time.sleep(1.2)
        assert [ended(machine)[0] for machine in machines] == [Stopped.exit_code] * 2
    status = status_of(place.run())
    assert (status.state, status.saved) == ("stopped", status.step)
    steps_before = steps(place.run())

    with started(network, place, trains(*LONG)) as machines:
        begun(machines)
        machines[1].send_signal(signal.SIGINT)
        assert [ended(machine)[0] for machine in machines] == [Stopped.exit_code] * 2
    status = status_of(place.run())
    assert (status.state, status.saved) == ("stopped", status.step)
