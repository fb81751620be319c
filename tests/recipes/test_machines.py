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
from simpletuner.train.checkpoint import read_state

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


def start(name: str, place: Workplace, command: Sequence[str], environ: dict[str, str]) -> subprocess.Popen[str]:
    """A command on the machine of that name."""
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-P", "-m", *command],
        cwd=place.folder,
        env={**os.environ, **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def started(
    network: Network, place: Workplace, commands: Sequence[Sequence[str]], environs: Sequence[dict[str, str]] = ({}, {})
) -> Iterator[list[subprocess.Popen[str]]]:
    """One command on each machine, or on the first alone, in the same working folder; what is left at the end of them,
    and of those that are added, is ended.
    """
    place.write()
    processes: list[subprocess.Popen[str]] = []
    ranks: set[int] = set()
    try:
        for name, command, environ in zip(network.names, commands, environs, strict=False):
            processes.append(start(name, place, command, environ))
        for process in processes:
            until(lambda process=process: bool(children(process.pid)), process)
            ranks |= {*children(process.pid)}
        yield processes
    finally:
        ranks |= {pid for process in processes for pid in children(process.pid)}
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
    """To the bit, from filling the caches on. They listen on their addresses in the network alone. Both machines' idle
    GPUs are in the events."""
    driver = workplace.folder / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    rows = "".join(f"echo '{index}, NVIDIA RTX 4090, 580.65, 24564, 300, 0'\n" for index in range(2))
    driver.write_text(f"#!/bin/sh\n{rows}")
    driver.chmod(0o755)
    slurm = {
        "PATH": f"{driver.parent}{os.pathsep}{os.environ['PATH']}",
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
    idle = [text for event in workplace.events("notice") if "stay idle" in (text := event["text"])]
    assert [text.partition(", ")[0] for text in idle] == [f"2 GPUs are visible on machine {each}" for each in range(2)]


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


def test_torchrun_goes_on_where_a_machine_comes_and_leaves(network: Network, cached_workplace: Workplace) -> None:
    """From the last checkpoint, with as many images a step."""
    place = cached_workplace
    elastic = ("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d")
    endpoint = f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}"
    # torchrun would know its machine by the name, which both share here.
    conf = "--rdzv-conf=last_call_timeout=2,keep_alive_interval=1,is_host="
    train = ("-m", "simpletuner", "train", *LONG, "--gradient_accumulation_steps=2")
    commands = [
        ["torch.distributed.run", *elastic, endpoint, f"--local-addr={address}", f"{conf}{number == 0}", *train]
        for number, address in enumerate(ADDRESSES)
    ]
    environ = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def accumulation(processes: int) -> int | None:
        """Of the last checkpoint, once so many processes have saved one."""
        runs, saved = place.events("run"), [e for e in place.events("checkpoint") if e["state"] == "saved"]
        if not runs or not saved or (runs[-1]["processes"], runs[-1]["start"]) != (processes, saved[-1]["start"]):
            return None
        return read_state(place.run().root / saved[-1]["path"]).config["gradient_accumulation_steps"]

    with started(network, place, commands[:1], [environ]) as agents:
        until(lambda: accumulation(1) == 2, agents[0])
        agents.append(start(network.names[1], place, commands[1], environ))
        until(lambda: accumulation(2) == 1, agents[0])
        for pid in (*children(agents[1].pid), agents[1].pid):
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(place.events("run")) == 3 and accumulation(1) == 2, agents[0])
        agents[0].send_signal(signal.SIGTERM)
        agents[0].wait(TIMEOUT_S)
    status = status_of(place.run())
    assert (status.state, status.saved) == ("stopped", status.step)
    runs = place.events("run")
    assert [run["processes"] for run in runs] == [1, 2, 1]
    taken = [event["step"] for event in place.events("step") if event["start"] == runs[0]["start"]]
    assert runs[1]["resumed_from"] == taken[-1], "it saved before the other came"
    assert runs[2]["resumed_from"] >= runs[1]["resumed_from"] + 1


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
        printed = [machine.communicate(timeout=TIMEOUT_S)[1].splitlines() for machine in machines]
        assert [machine.returncode for machine in machines] == [Stopped.exit_code] * 2
    status = status_of(place.run())
    assert (status.state, status.saved) == ("stopped", status.step)
    assert "Machine 1 was asked to stop." in printed[0]
    assert printed[0][-1] == (
        f"stopped after step {status.step} of 4000; the run is saved. Run the same command again to resume."
    )
    assert printed[1][-1].startswith("stopped with machine 0, which reports what is saved.")
