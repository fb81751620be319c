"""Supervisors of several machines find each other, on the loopback interface in place of a network."""

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import pytest

from simpletuner.base.errors import ConfigError, RanksError
from simpletuner.runs import machines
from simpletuner.runs.machines import Machines, meet

HERE = "127.0.0.1"
TERMS = {"learning_rate": 0.1, "num_processes": 6}


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_address", lambda host: host)
    monkeypatch.setattr(machines, "CONNECT_AGAIN_S", 0.1)


@pytest.fixture
def port() -> int:
    with socket.create_server((HERE, 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


Come = Future[Machines]


def come(pool: ThreadPoolExecutor, number: int, port: int, timeout_s: float = 20, **terms: Any) -> Come:
    return pool.submit(meet, number, 3, HERE, port, TERMS | terms, timeout_s)


def test_three_machines_meet_whoever_else_comes(
    pool: ThreadPoolExecutor, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    second = come(pool, 2, port)
    first = come(pool, 0, port)
    refused = come(pool, 1, port, learning_rate=0.2)
    with pytest.raises(ConfigError) as error:
        refused.result(20)
    assert str(error.value) == "learning_rate = 0.2 on machine 1: expected 0.1, as on machine 0."
    with socket.create_connection((HERE, port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100) == b""
    twins = {second, come(pool, 2, port)}
    later = next(as_completed(twins, 20))
    with pytest.raises(ConfigError, match=f"machine_rank = 2: {HERE} has that number: expected a different number"):
        later.result()
    (second,) = twins - {later}
    assert not first.done()
    together = [first.result(20) for first in (first, come(pool, 1, port), second)]
    assert [len(each.links) for each in together] == [2, 1, 1]
    assert len({each.store_port for each in together}) == 1
    assert f"{HERE} was refused: learning_rate = 0.2 on machine 1" in capsys.readouterr().out
    with pytest.raises(ConnectionRefusedError):  # nobody can come any more
        socket.create_connection((HERE, port))

    together[1].links[0].send(stop=True)
    together[0].links[1].send(failure={"rank": 0})
    for number, expected in ((0, [[{"stop": True}], []]), (2, [[{"failure": {"rank": 0}}]])):
        assert [wait_for(link, len(each)) for link, each in zip(together[number].links, expected, strict=True)] == (
            expected
        )
    assert [*together[0].unreachable()] == []
    together[1].close(8)
    assert wait_for(together[0].links[0], 1) == [{"ended": 8}]
    assert [*together[0].unreachable()] == [(1, "closed its connection")]
    assert [*together[0].unreachable()] == []
    together[0].timeout_s = -1
    assert [*together[0].unreachable()] == [(2, "sent no message for -1 s")]
    for each in together:
        each.close(0)


def wait_for(link: machines.MachineLink, count: int) -> list[dict[str, Any]]:
    """So many messages of a link."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        found += link.receive()
    return found


def test_one_that_leaves_while_it_waits_may_come_again(pool: ThreadPoolExecutor, port: int) -> None:
    first = come(pool, 0, port)
    with pytest.raises(RanksError, match=r"machine 0 at .* did not answer for 1 s \(other machines are missing\)"):
        come(pool, 1, port, timeout_s=1).result(20)
    for each in [first, come(pool, 1, port), come(pool, 2, port)]:
        each.result(20).close(0)


def test_who_does_not_come_is_named(pool: ThreadPoolExecutor, port: int) -> None:
    with pytest.raises(RanksError) as error:
        come(pool, 0, port, timeout_s=0.3).result(20)
    assert str(error.value) == (
        f"machine 1, 2 did not connect to {HERE}, port {port}, within 0 s. "
        "Start the same command there with --machine_rank=1."
    )
    with pytest.raises(RanksError, match=r"port \d+ did not answer for 0 s \(Connection refused\)"):
        come(pool, 1, port, timeout_s=0.3).result(20)


def test_a_port_that_is_taken_is_named(port: int) -> None:
    with (
        socket.create_server((HERE, port)),
        pytest.raises(ConfigError, match=f"main_process_port = {port} at {HERE}: Address already in use"),
    ):
        meet(0, 2, HERE, port, TERMS, 1)
    with pytest.raises(ConfigError, match=r"main_process_ip = 192\.0\.2\.1 is not an address of this machine"):
        meet(0, 2, "192.0.2.1", port, TERMS, 1)


def test_an_address_that_only_this_machine_reaches_is_refused(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(machines, "source_address", lambda _: "10.0.0.5")
    for host in (HERE, "localhost"):
        with pytest.raises(ConfigError, match="no other machine can reach: expected machine 0's address") as error:
            meet(0, 2, host, port, TERMS, 1)
        assert "give --main_process_ip=10.0.0.5 on all machines." in str(error.value)
    with pytest.raises(ConfigError, match=r"main_process_ip = 'no\.such\.host\.invalid': "):
        meet(0, 2, "no.such.host.invalid", port, TERMS, 1)
