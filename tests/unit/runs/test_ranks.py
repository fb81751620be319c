"""The supervisor of several processes, with ranks that hold no model."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.tiers import others_slow

from simpletuner.base.errors import ConfigError
from simpletuner.base.signals import REPEAT_S, STOPPED
from simpletuner.runs import ranks
from simpletuner.runs.events import read_events
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.ranks import RANKS_FOLDER, Supervisor, read_rank_place
from simpletuner.runs.status import status_of

HERE = Path(__file__).parent
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    return directory


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_S", 2.0)
    monkeypatch.setattr(ranks, "REST_S", 0.3)


def program(code: str) -> list[str]:
    return [sys.executable, "-P", str(HERE / "rank_program.py"), code]


def supervised(run: RunDirectory, code: str, size: int = 2, **environ: str) -> int:
    return Supervisor(size, run)(program(code), {**os.environ, **environ})


def test_ranks_know_their_place_and_the_others_output_is_kept_back(
    run: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = """
print(f"rank {rank} speaks", flush=True)
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE OMP_NUM_THREADS".split()
mode = oct(os.stat(place.folder).st_mode & 0o777)
text = " ".join([*(os.environ[name] for name in names), mode, str(os.getpgrp() == os.getpid())])
open(f"rank-{rank}", "w").write(text)
open("folder", "w").write(str(place.folder))
"""
    threads = str(max(1, ranks.usable_cores() // 2))
    assert supervised(run, code) == 0
    assert capfd.readouterr().out == "rank 0 speaks\n"
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text() == f"{rank} {rank} 2 2 {threads} 0o700 True"
    assert not Path((tmp_path / "folder").read_text()).exists()
    assert supervised(run, code, OMP_NUM_THREADS="7") == 0
    assert (tmp_path / "rank-1").read_text().split()[4] == "7"


ENDINGS: dict[str, tuple[str, int, str]] = {
    "an error of rank 1 that rank 0 notices": (
        "wait_for_others() if rank == 0 else exec(\"raise DataError.of('no images')\")",
        3,
        "rank 1: no images.",
    ),
    "an error of rank 1 that rank 0 never notices": (
        "time.sleep(60) if rank == 0 else exec(\"raise DataError.of('no images')\")",
        3,
        "rank 1: no images.",
    ),
    "rank 1 is killed, and rank 0 finds its connection closed": (
        """
if rank == 1:
    os.kill(os.getpid(), 9)
time.sleep(0.1)
raise RanksError.of("connection closed by peer")
""",
        8,
        "rank 1 was killed by signal 9 (SIGKILL). If nobody sent it, the machine ran out of memory: check the system's "
        "log (dmesg).",
    ),
    "rank 1 is killed, and a collective of FSDP breaks": (
        """
if rank == 1:
    os.kill(os.getpid(), 9)
time.sleep(0.1)
raise RuntimeError("[/src/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:26733")
""",
        8,
        "rank 1 was killed by signal 9 (SIGKILL). If nobody sent it, the machine ran out of memory: check the system's "
        "log (dmesg).",
    ),
    "rank 0 notices, and a collective breaks all the same": (
        """
if rank == 1:
    raise DataError.of("no images")
try:
    wait_for_others()
except DataError:
    raise RuntimeError("[/src/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
""",
        3,
        "rank 1: no images.",
    ),
    "rank 0 is killed": (
        "time.sleep(60) if rank == 1 else os.kill(os.getpid(), 15) or os.kill(os.getpid(), 11)",
        8,
        "rank 0 was killed by signal 11 (SIGSEGV).",
    ),
    "rank 1 does not answer": (
        "time.sleep(60) if rank == 1 else exec(\"raise RanksError.of('timed out after 5 s')\")",
        8,
        "rank 1 does not answer: timed out after 5 s.",
    ),
    "a bug in rank 1": (
        "wait_for_others() if rank == 0 else 1 / 0",
        1,
        "rank 1: ZeroDivisionError: division by zero",
    ),
    "rank 1 ends without an error": (
        'wait_for_others() if rank == 0 else print("terminate called", flush=True) or os._exit(9)',
        1,
        "rank 1: terminate called.",
    ),
    "the same error on all": ("raise DataError.of('no images')", 3, "no images."),
}


@pytest.mark.parametrize(
    "case",
    others_slow(
        ENDINGS,
        "an error of rank 1 that rank 0 notices",
        "rank 1 is killed, and rank 0 finds its connection closed",
        "rank 0 is killed",
    ),
)
def test_the_first_failing_rank_comes_last_and_once(
    run: RunDirectory, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, exit_code, text = ENDINGS[case]
    found = supervised(run, code)
    printed = capfd.readouterr().err.strip().splitlines()
    assert (found, printed[-1]) == (exit_code if exit_code != 1 else found, text)
    assert exit_code == 1 or printed.count(text) == 1


def test_of_three_ranks_the_cause_is_named_and_not_who_noticed_it(
    run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    code = """
started = place.folder / "started"
if rank == 2:
    started.touch()
    time.sleep(0.2)
    raise DataError.of("no images")
while not started.exists():  # however late this machine starts it
    time.sleep(0.01)
time.sleep(0.1 * rank)
raise RanksError.of("connection closed by peer")
"""
    assert supervised(run, code, size=3) == 3
    assert capfd.readouterr().err == "rank 2: no images.\n"


def test_the_events_of_a_rank_0_that_was_ended_name_the_rank_that_failed(run: RunDirectory) -> None:
    code = f"""
run = RunDirectory(__import__("pathlib").Path({str(run.root)!r}))
if rank == 0:
    with run.lock(), EventLog(run.events) as events:
        events.emit(PhaseEvent(phase="load", state="begin"))
        time.sleep(60)
while not run.events.exists() or not run.events.stat().st_size:
    time.sleep(0.02)
raise DataError.of("no images")
"""
    assert supervised(run, code) == 3
    status = status_of(run)
    assert (status.state, status.error, status.exit_code, status.starts) == ("failed", "rank 1: no images.", 3, 1)
    assert [event["id"] for event in read_events(run.events)] == [1, 2, 3]


Started = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(run: RunDirectory, tmp_path: Path) -> Iterator[Started]:
    """Starts a supervisor of two ranks in a session of its own; each rank writes its pid into `rank-N`."""
    started = []

    def begin(code: str) -> subprocess.Popen[bytes]:
        told = 'open(f"rank-{rank}.new", "w").write(str(os.getpid())); os.rename(f"rank-{rank}.new", f"rank-{rank}")\n'
        command = [sys.executable, "-P", str(HERE / "supervised.py"), "2", str(run.root), *program(told + code)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        started.append(process)
        until(lambda: all((tmp_path / f"rank-{rank}").exists() for rank in range(2)))
        return process

    yield begin
    end_all(started, tmp_path, 2)


def end_all(supervisors: list[subprocess.Popen[bytes]], folder: Path, ranks: int) -> None:
    """Kill supervisors and the ranks whose pids lie in `folder`."""
    for process in supervisors:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    for rank in range(ranks):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(pid_of(folder, rank), signal.SIGKILL)


def pid_of(folder: Path, rank: int) -> int:
    return int((folder / f"rank-{rank}").read_text())


def state_of(pid: int) -> str:
    """R, S, T, Z …; X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def until(is_so: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


OBEYS = """
while rank or deferred_signals.first is None:
    time.sleep(0.02)
raise Stopped.of(f"stopped by {deferred_signals.first}")
"""


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_is_for_rank_0_to_obey(start: Started, tmp_path: Path, number: signal.Signals) -> None:
    supervisor = start(OBEYS)
    os.kill(pid_of(tmp_path, 1), number)  # as a cluster sends it to every process
    time.sleep(0.1)
    assert supervisor.poll() is None
    supervisor.send_signal(number)
    assert supervisor.wait(10) == STOPPED
    assert supervisor.communicate()[1].splitlines()[-1] == f"stopped by {number.value}.".encode()


def test_a_signal_that_ends_rank_0_before_it_holds_signals_back_is_a_stop(start: Started) -> None:
    supervisor = start("""
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    open("ready", "w")
time.sleep(60)
""")
    until(Path("ready").exists)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(10) == STOPPED
    assert supervisor.communicate()[1] == b""


def test_a_second_ctrl_c_ends_all_where_rank_0_does_not_listen(start: Started, tmp_path: Path) -> None:
    supervisor = start("time.sleep(60)")
    os.kill(pid_of(tmp_path, 0), signal.SIGSTOP)
    supervisor.send_signal(signal.SIGINT)
    time.sleep(REPEAT_S + 0.1)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(10) == STOPPED
    assert {state_of(pid_of(tmp_path, rank)) for rank in range(2)} <= {"X", "Z"}


def test_ctrl_z_pauses_all_and_fg_continues_all(start: Started, tmp_path: Path) -> None:
    supervisor = start(OBEYS)
    everyone = [supervisor.pid, *(pid_of(tmp_path, rank) for rank in range(2))]
    supervisor.send_signal(signal.SIGTSTP)
    until(lambda: [state_of(pid) for pid in everyone] == ["T"] * 3)
    supervisor.send_signal(signal.SIGCONT)
    until(lambda: "T" not in [state_of(pid) for pid in everyone])
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(10) == STOPPED


def test_no_rank_survives_its_supervisor(start: Started, tmp_path: Path) -> None:
    supervisor = start("open('folder', 'w').write(str(place.folder)); time.sleep(60)")
    until((tmp_path / "folder").exists)
    os.kill(pid_of(tmp_path, 1), signal.SIGSTOP)
    until(lambda: state_of(pid_of(tmp_path, 1)) == "T")  # the system continues it once nobody is left who could
    supervisor.kill()
    supervisor.wait(10)
    until(lambda: {state_of(pid_of(tmp_path, rank)) for rank in range(2)} <= {"X", "Z"})
    until(lambda: not Path((tmp_path / "folder").read_text()).exists())


def test_a_place_is_that_of_our_supervisor_or_of_torchrun() -> None:
    assert read_rank_place({}) is None
    assert read_rank_place({"MASTER_ADDR": "elsewhere", "LOCAL_RANK": "3"}) is None
    assert read_rank_place({"RANK": "0", "WORLD_SIZE": "1"}) is None
    place = read_rank_place(TORCHRUN)
    assert place is not None
    assert (place.rank, place.size, place.local_rank, place.errors) == (1, 2, 1, None)
    ours = read_rank_place({**{name: TORCHRUN[name] for name in list(TORCHRUN)[:4]}, RANKS_FOLDER: "/tmp/ours"})
    assert ours is not None
    assert ours.errors is not None


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not set"),
        ({**TORCHRUN, "RANK": "one", "WORLD_SIZE": "-2"}, "RANK=one"),
        ({**TORCHRUN, "RANK": "one", "WORLD_SIZE": "-2"}, "WORLD_SIZE=-2"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2 in the environment: expected a number below WORLD_SIZE, 2"),
        ({**TORCHRUN, "WORLD_SIZE": "3"}, "expected the same number of processes on each machine"),
        ({**TORCHRUN, "RANK": "2", "WORLD_SIZE": "4"}, "RANK=2 with WORLD_SIZE=4, LOCAL_RANK=1 and LOCAL_WORLD_SIZE=2"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ],
)
def test_an_environment_that_is_half_set_is_refused(environ: dict[str, str], found: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_rank_place(environ)
    assert found in str(error.value)
    assert "torchrun" in str(error.value)


@pytest.fixture
def machines(run: RunDirectory, tmp_path: Path) -> Iterator[Started]:
    """Starts a supervisor of two ranks on each of two machines; as `start`, and each ends with its output read."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(code: str) -> list[subprocess.Popen[bytes]]:
        told = 'open(f"rank-{rank}.new", "w").write(str(os.getpid())); os.rename(f"rank-{rank}.new", f"rank-{rank}")\n'
        meet = """
def meet():
    while not all(os.path.exists(f"rank-{each}") for each in range(4)):
        time.sleep(0.02)
"""
        ranks = program(meet + told + code)
        command = [sys.executable, "-P", str(HERE / "supervised.py"), "2", str(run.root), *ranks]
        with socket.create_server(("127.0.0.1", 0)) as free:
            common = {**os.environ, "MACHINES": "2", "PORT": str(free.getsockname()[1])}
        for number in range(2):
            environ = common | {"MACHINE": str(number)}
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(command, env=environ, start_new_session=True, **pipes))
        until(lambda: all((tmp_path / f"rank-{rank}").exists() for rank in range(4)))
        return started

    yield begin
    end_all(started, tmp_path, 4)


def endings(machines: list[subprocess.Popen[bytes]]) -> list[tuple[int, str]]:
    """Exit code and last line of each machine."""
    printed = [machine.communicate(timeout=20)[1].decode().strip().rpartition("\n")[2] for machine in machines]
    return [(machine.returncode, text) for machine, text in zip(machines, printed, strict=True)]


STOPPED_WITH_MACHINE_0 = "stopped with machine 0, which reports what is saved. Run the same commands again to resume."
KILLED = (
    "rank 3 was killed by signal 9 (SIGKILL). If nobody sent it, the machine ran out of memory: check the system's "
)
ON_TWO_MACHINES: dict[str, tuple[str, int, str]] = {
    "an error that rank 0 notices": ("wait_for_others() if rank < 3 else fail()", 3, "rank 3: no images."),
    "an error that nobody notices": ("time.sleep(60) if rank < 3 else fail()", 3, "rank 3: no images."),
    "an error of rank 0": ("wait_for_others() if rank else fail()", 3, "no images."),
    "a rank is killed": (
        "wait_for_others() if rank < 3 else os.kill(os.getpid(), 9)",
        8,
        f"{KILLED}log (dmesg).",
    ),
    "all is well": ("meet()", 0, ""),
    "rank 0 was stopped": ("wait_for_others() if rank else exec(\"raise Stopped.of('as asked')\")", 75, "as asked."),
}


@pytest.mark.parametrize(
    "case", others_slow(ON_TWO_MACHINES, "an error that rank 0 notices", "a rank is killed", "all is well")
)
def test_each_machine_says_what_ended_a_rank_of_another(machines: Started, case: str) -> None:
    code, exit_code, text = ON_TWO_MACHINES[case]
    first, second = endings(machines("def fail(): raise DataError.of('no images')\n" + code))
    assert first == (exit_code, text)
    elsewhere = {"no images.": "rank 0: no images.", "as asked.": STOPPED_WITH_MACHINE_0}
    assert second == (exit_code, elsewhere.get(text, text))


def test_ranks_of_two_machines_know_their_place(machines: Started, tmp_path: Path) -> None:
    code = """
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR".split()
place = f"{place.machine} {place.machines} {'RANKS_LISTENER' in os.environ}"
open(f"place-{rank}", "w").write(" ".join([*(os.environ[name] for name in names), place]))
meet()
time.sleep(0.3 if rank == 0 else 0)
"""
    assert [code for code, _ in endings(machines(code))] == [0, 0]
    for rank in range(4):
        expected = f"{rank} {rank % 2} 4 2 127.0.0.1 {rank // 2} 2 {rank == 0}"
        assert (tmp_path / f"place-{rank}").read_text() == expected


def test_a_machine_that_is_gone_or_silent_is_named_by_the_other(machines: Started, tmp_path: Path) -> None:
    first, second = machines("wait_for_others()")
    second.kill()
    assert endings([first]) == [(8, "rank 2 does not answer: machine 1 closed its connection.")]
    until(lambda: all(state_of(pid_of(tmp_path, rank)) in "XZ" for rank in range(4)))


def test_a_machine_that_gives_no_sign_of_life_is_named_by_the_other(machines: Started) -> None:
    first, second = machines("wait_for_others()")
    first.send_signal(signal.SIGSTOP)
    assert endings([second]) == [(8, "rank 0 does not answer: machine 0 sent no message for 2 s.")]


def test_a_signal_to_any_machine_stops_all(machines: Started, tmp_path: Path) -> None:
    """As a cluster sends it to every process, to some machines later: the first save is not broken off."""
    first, second = machines("""
while rank or deferred_signals.first is None:
    place.errors.check()
    time.sleep(0.02)
while not os.path.exists("saved"):
    time.sleep(0.02)
raise Stopped.of(f"stopped by {deferred_signals.first}")
""")
    for pid in (second.pid, pid_of(tmp_path, 2), pid_of(tmp_path, 3)):
        os.kill(pid, signal.SIGTERM)
    time.sleep(REPEAT_S + 0.2)
    for pid in (first.pid, pid_of(tmp_path, 0), pid_of(tmp_path, 1)):
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    (tmp_path / "saved").touch()
    printed = [machine.communicate(timeout=20)[1].decode().splitlines() for machine in (first, second)]
    assert [first.returncode, second.returncode] == [STOPPED, STOPPED]
    assert printed[0][0] == "Machine 1 was asked to stop."
    assert printed[0][-1] == f"stopped by {signal.SIGTERM.value}."
    asked = "Asked machine 0 to stop the run; a second SIGINT (Ctrl-C) or SIGTERM exits at once."
    assert printed[1] == [asked, STOPPED_WITH_MACHINE_0]
