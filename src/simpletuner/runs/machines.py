"""How the machines of a run meet, and the lines between them: one from each machine's supervisor to that of machine 0.

Machine 0 listens on `main_process_ip` until all have come, and refuses who would train something else. From then on
lines of JSON travel: signs of life, errors of ranks, wishes to stop. They are in clear: the network must be trusted.
"""

import contextlib
import errno
import ipaddress
import json
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from simpletuner.base.console import say
from simpletuner.base.errors import ConfigError, Problem, RanksError
from simpletuner.base.machine import own_address
from simpletuner.config.values import shown
from simpletuner.runs.process import stop_if_asked

LOOK_FOR_MACHINES_EVERY_S = 0.05
CONNECT_AGAIN_S = 1.0
HELLO_WITHIN_S = 2.0
"""Time for who has connected to say which machine it is."""
MOST_UNREAD_BYTES = 2**20
"""Of a line: who sends a longer one is no supervisor."""
ELSEWHERE = "192.0.2.1"
"""An address that leads out of the machine (RFC 5737); nothing is sent to it."""


@dataclass
class MachineLine:
    """A connection to another machine's supervisor. None of its calls waits."""

    connection: socket.socket
    address: str
    """Of the other machine."""
    machine: int = 0
    """The other one's number."""
    heard_at: float = field(default_factory=time.monotonic)
    ended: int | None = None
    """Exit code with which the other has ended; None as long as it goes on."""
    is_closed: bool = False
    _sent_at: float = 0.0
    _unread: bytes = b""
    _messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connection.setblocking(False)

    def send(self, **message: Any) -> None:
        """Send a message. Where the connection is gone, `receive` notices."""
        self._sent_at = time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def give_sign(self, every_s: float) -> None:
        """Send a sign of life where nothing was sent for `every_s`."""
        if time.monotonic() - self._sent_at > every_s:
            self.send()

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come; signs of life left out."""
        try:
            while chunk := self.connection.recv(65536):
                self.heard_at = time.monotonic()
                *lines, self._unread = (self._unread + chunk).split(b"\n")
                self._messages += [message for line in lines if isinstance(message := json.loads(line), dict)]
                if len(self._unread) > MOST_UNREAD_BYTES:
                    raise ValueError("a line without an end")
            self.is_closed = True
        except BlockingIOError:
            pass
        except (OSError, ValueError, RecursionError):
            self.is_closed = True
        messages, self._messages = self._messages, []
        return [message for message in messages if message]

    def answer(self, within_s: float) -> dict[str, Any] | None:
        """The next message; None where none comes in time, or the other has closed the connection.

        Raises:
            Stopped: a signal arrived.
        """
        deadline = time.monotonic() + within_s
        while True:
            first, *self._messages = self.receive() or [{}]
            if first or self.is_closed or time.monotonic() > deadline:
                return first or None
            stop_if_asked()
            time.sleep(LOOK_FOR_MACHINES_EVERY_S)

    def close(self) -> None:
        self.connection.close()


@dataclass
class Machines:
    """The machines of a run, as one of them sees the others."""

    number: int
    count: int
    address: str
    """Of machine 0, as the others reach it."""
    timeout_s: float
    store_port: int = 0
    """Where rank 0's store listens on machine 0."""
    store_listener: socket.socket | None = None
    """The socket of that port, on machine 0, until rank 0 has it."""
    lines: list[MachineLine] = field(default_factory=list)
    """To all others on machine 0; elsewhere to machine 0 alone."""

    def close(self, exit_code: int) -> None:
        """Tell the others how this machine ended."""
        for line in self.lines:
            line.send(ended=exit_code)
            line.receive()  # what is unread when a connection is closed would take back what was sent
            line.close()
        if self.store_listener is not None:
            self.store_listener.close()

    def lost(self) -> Iterator[tuple[int, str]]:
        """Machines that are out of reach though they have not ended, and why; each once."""
        for line in self.lines:
            silent_s = time.monotonic() - line.heard_at
            if line.ended is None and (line.is_closed or silent_s > self.timeout_s):
                line.ended = RanksError.exit_code
                why = "closed its connection" if line.is_closed else f"gave no sign of life for {self.timeout_s:.0f} s"
                yield line.machine, why

    def give_signs(self) -> None:
        for line in self.lines:
            line.give_sign(min(10.0, self.timeout_s / 5))


def meet(machine: int, count: int, host: str, port: int, terms: Mapping[str, Any], timeout_s: float) -> Machines:
    """Wait until all machines of a run have come.

    Args:
        machine: this one's number.
        count: how many there are.
        host: machine 0's address or name.
        terms: options that must be the same everywhere, as JSON values.

    Raises:
        ConfigError: `host` is no address to meet at, or machine 0 trains something else.
        RanksError: the others did not come in time.
        Stopped: a signal arrived before.
    """
    address = _address(host)
    return (_listen if machine == 0 else _connect)(Machines(machine, count, address, timeout_s), port, terms)


def _address(host: str) -> str:
    """`host` as an address that other machines reach."""
    found = f"main_process_ip = {shown(host)}"
    try:
        choices = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        # All machines must choose alike, and gloo's interface is known by its IPv4 address.
        address = str(min(choices, key=lambda choice: choice[0] != socket.AF_INET)[4][0])
    except (OSError, UnicodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ConfigError.of(f"{found}: {reason}", "machine 0's address, or a name that has one") from None
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.is_loopback or parsed.is_unspecified:
        try:
            remedy = f"If this is machine 0, give --main_process_ip={own_address(ELSEWHERE)} on all of them."
        except OSError:
            remedy = ""
        is_named = "" if host == address else f", {address} here"
        raise ConfigError.of(f"{found}{is_named}, which no other machine reaches", "machine 0's address", remedy)
    return address


def _listen(machines: Machines, port: int, terms: Mapping[str, Any]) -> Machines:
    """Machine 0: let the others come."""
    family = socket.AF_INET6 if ":" in machines.address else socket.AF_INET
    try:
        listener = socket.create_server((machines.address, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError.of(
                f"main_process_ip = {machines.address} is no address of this machine, which has machine_rank = 0",
                "machine 0's own address",
            ) from None
        raise ConfigError.of(
            f"main_process_port = {port} at {machines.address}: {error.strerror}",
            "a port that is free",
            "Give another --main_process_port on all machines.",
        ) from None
    come: dict[int, MachineLine] = {}
    deadline = time.monotonic() + machines.timeout_s
    say(f"Machine 0 of {machines.count} waits for the others at {machines.address}, port {port}.")
    with listener, contextlib.ExitStack() as on_failure:
        listener.settimeout(0.2)
        while len(come) < machines.count - 1:
            stop_if_asked()
            if time.monotonic() > deadline:
                missing = [number for number in range(1, machines.count) if number not in come]
                raise RanksError.of(
                    f"machine {', '.join(map(str, missing))} did not come to {machines.address}, port {port}, for "
                    f"{machines.timeout_s:.0f} s",
                    remedy=f"Start the same command there with --machine_rank={missing[0]}.",
                )
            with contextlib.suppress(TimeoutError):
                connection, (peer, *_) = listener.accept()
                line = MachineLine(connection, peer)
                on_failure.callback(line.close)
                _let_in(line, come, terms, machines.count)
        on_failure.pop_all()
    machines.lines = [come[number] for number in sorted(come)]
    machines.store_listener = socket.create_server((machines.address, 0), family=family)
    machines.store_port = machines.store_listener.getsockname()[1]
    for line in machines.lines:
        line.heard_at = time.monotonic()
        line.send(store_port=machines.store_port)
    return machines


def _let_in(line: MachineLine, come: dict[int, MachineLine], terms: Mapping[str, Any], count: int) -> None:
    """Add who has connected to those that have `come`, or refuse it."""
    hello = line.answer(HELLO_WITHIN_S)
    number = None if hello is None else hello.get("machine")
    # Whatever a stranger sends is no machine of this run.
    if hello is None or type(number) is not int or not 0 < number < count or not isinstance(hello.get("terms"), dict):
        line.close()
        return
    line.machine = number
    for each in [*come.values()]:
        each.receive()
        if each.is_closed:  # it was stopped, and may come again
            each.close()
            del come[each.machine]
    problems = [
        Problem(f"{name} = {shown(hello['terms'].get(name))} on machine {number}", f"{shown(value)}, as on machine 0")
        for name, value in terms.items()
        if hello["terms"].get(name) != value
    ]
    if number in come:
        problems.append(Problem(f"machine_rank = {number}: {come[number].address} has that number", "one for each"))
    if problems:
        line.send(refused=[(problem.found, problem.expected) for problem in problems])
        say(f"{line.address} was refused: {' '.join(map(str, problems))}")
        line.close()
    else:
        come[number] = line


def _connect(machines: Machines, port: int, terms: Mapping[str, Any]) -> Machines:
    """Another machine than 0: come to it."""
    deadline = time.monotonic() + machines.timeout_s
    where = f"machine 0 at {machines.address}, port {port}"
    say(f"Machine {machines.number} of {machines.count} looks for {where}.")
    reason = ""
    while True:
        stop_if_asked()
        if time.monotonic() > deadline:
            raise RanksError.of(
                f"{where} did not answer for {machines.timeout_s:.0f} s ({reason})",
                remedy="Start the same command there with --machine_rank=0.",
            )
        try:
            connection = socket.create_connection((machines.address, port), CONNECT_AGAIN_S)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
            continue
        line = MachineLine(connection, machines.address)
        line.send(machine=machines.number, terms=dict(terms))
        answer = line.answer(deadline - time.monotonic())
        if answer is not None and ("refused" in answer or isinstance(answer.get("store_port"), int)):
            break
        line.close()
        reason = "it closed the connection" if line.is_closed else "other machines are missing"
        time.sleep(CONNECT_AGAIN_S)
    if "refused" in answer:
        line.close()
        raise ConfigError(*(Problem(found, expected) for found, expected in answer["refused"]))
    machines.lines, machines.store_port = [line], int(answer["store_port"])
    return machines
