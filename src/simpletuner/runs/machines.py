"""Rendezvous of a run's machines, and the connections between them: one from each supervisor to that of machine 0.

Machine 0 listens on `main_process_ip` until all machines have connected, and refuses a machine with other options. Then
the supervisors exchange lines of JSON: heartbeats, errors of ranks, requests to stop. The lines are not encrypted, so
the network must be trusted.
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
from simpletuner.base.machine import source_address
from simpletuner.config.values import value_text
from simpletuner.runs.process import stop_if_asked

LOOK_FOR_MACHINES_EVERY_S = 0.05
CONNECT_AGAIN_S = 1.0
HELLO_WITHIN_S = 2.0
"""Seconds in which a new connection must send its machine number."""
MAX_LINE_BYTES = 2**20
"""Maximum length of a line: a peer that sends a longer line is not a supervisor."""
EXTERNAL_ADDRESS = "192.0.2.1"
"""An address outside the machine (RFC 5737), to find the route to other machines; nothing is sent to it."""


@dataclass
class MachineLink:
    """A connection to another machine's supervisor. Its calls do not block, apart from `answer`."""

    connection: socket.socket
    address: str
    """Address of the other machine."""
    machine: int = 0
    """Number of the other machine."""
    heard_at: float = field(default_factory=time.monotonic)
    exit_code: int | None = None
    """Exit code of the other machine; None while it runs."""
    is_closed: bool = False
    _sent_at: float = 0.0
    _unread: bytes = b""
    _messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connection.setblocking(False)

    def send(self, **message: Any) -> None:
        """Send a message. A broken connection is detected by `receive`."""
        self._sent_at = time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def send_heartbeat(self, every_s: float) -> None:
        """Send an empty message if nothing was sent for `every_s` seconds."""
        if time.monotonic() - self._sent_at > every_s:
            self.send()

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages received so far, without heartbeats."""
        try:
            while chunk := self.connection.recv(65536):
                self.heard_at = time.monotonic()
                *lines, self._unread = (self._unread + chunk).split(b"\n")
                self._messages += [message for line in lines if isinstance(message := json.loads(line), dict)]
                if len(self._unread) > MAX_LINE_BYTES:
                    raise ValueError("a line without an end")
            self.is_closed = True
        except BlockingIOError:
            pass
        except (OSError, ValueError, RecursionError):
            self.is_closed = True
        messages, self._messages = self._messages, []
        return [message for message in messages if message]

    def answer(self, within_s: float) -> dict[str, Any] | None:
        """Wait for the next message. None after `within_s` seconds, or if the other machine closed the connection.

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
    """The machines of a run, and this machine's connections to the others."""

    number: int
    count: int
    address: str
    """Address of machine 0, as the other machines reach it."""
    timeout_s: float
    store_port: int = 0
    """Port of rank 0's store on machine 0."""
    store_listener: socket.socket | None = None
    """The listening socket of that port, on machine 0, until rank 0 has inherited it."""
    links: list[MachineLink] = field(default_factory=list)
    """On machine 0, connections to all other machines; on the others, only the connection to machine 0."""

    def close(self, exit_code: int) -> None:
        """Send this machine's exit code to the others and close the connections."""
        for link in self.links:
            link.send(ended=exit_code)
            link.receive()  # closing a connection with unread data would discard the sent message
            link.close()
        if self.store_listener is not None:
            self.store_listener.close()

    def unreachable(self) -> Iterator[tuple[int, str]]:
        """Yield machines that are unreachable although they have not ended, with the reason; each only once."""
        for link in self.links:
            silent_s = time.monotonic() - link.heard_at
            if link.exit_code is None and (link.is_closed or silent_s > self.timeout_s):
                link.exit_code = RanksError.exit_code
                reason = "closed its connection" if link.is_closed else f"sent no message for {self.timeout_s:.0f} s"
                yield link.machine, reason

    def send_heartbeats(self) -> None:
        for link in self.links:
            link.send_heartbeat(min(10.0, self.timeout_s / 5))


def meet(machine: int, count: int, host: str, port: int, terms: Mapping[str, Any], timeout_s: float) -> Machines:
    """Connect to the other machines of a run, and wait until all machines are connected.

    Args:
        machine: number of this machine.
        count: number of machines.
        host: address or name of machine 0.
        terms: options that must be the same on all machines, as JSON values.

    Raises:
        ConfigError: `host` is not a usable address, or machine 0 has other options.
        RanksError: the other machines did not connect in time.
        Stopped: a signal arrived meanwhile.
    """
    address = _address(host)
    return (_listen if machine == 0 else _connect)(Machines(machine, count, address, timeout_s), port, terms)


def _address(host: str) -> str:
    """The address of `host`, which other machines must be able to reach."""
    finding = f"main_process_ip = {value_text(host)}"
    try:
        choices = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        # All machines must choose the same address, and gloo's interface is found by its IPv4 address.
        address = str(min(choices, key=lambda choice: choice[0] != socket.AF_INET)[4][0])
    except (OSError, UnicodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ConfigError.of(f"{finding}: {reason}", "machine 0's address, or a name that has one") from None
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.is_loopback or parsed.is_unspecified:
        try:
            remedy = f"If this is machine 0, give --main_process_ip={source_address(EXTERNAL_ADDRESS)} on all machines."
        except OSError:
            remedy = ""
        local = "" if host == address else f", {address} here"
        raise ConfigError.of(f"{finding}{local}, which no other machine can reach", "machine 0's address", remedy)
    return address


def _listen(machines: Machines, port: int, terms: Mapping[str, Any]) -> Machines:
    """Machine 0: accept the connections of the other machines."""
    family = socket.AF_INET6 if ":" in machines.address else socket.AF_INET
    try:
        listener = socket.create_server((machines.address, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError.of(
                f"main_process_ip = {machines.address} is not an address of this machine, which has machine_rank = 0",
                "machine 0's own address",
            ) from None
        raise ConfigError.of(
            f"main_process_port = {port} at {machines.address}: {error.strerror}",
            "a free port",
            "Give another --main_process_port on all machines.",
        ) from None
    connected: dict[int, MachineLink] = {}
    deadline = time.monotonic() + machines.timeout_s
    say(f"Machine 0 of {machines.count} waits for the others at {machines.address}, port {port}.")
    with listener, contextlib.ExitStack() as on_failure:
        listener.settimeout(0.2)
        while len(connected) < machines.count - 1:
            stop_if_asked()
            if time.monotonic() > deadline:
                missing = [number for number in range(1, machines.count) if number not in connected]
                raise RanksError.of(
                    f"machine {', '.join(map(str, missing))} did not connect to {machines.address}, port {port}, "
                    f"within {machines.timeout_s:.0f} s",
                    remedy=f"Start the same command there with --machine_rank={missing[0]}.",
                )
            with contextlib.suppress(TimeoutError):
                connection, (peer, *_) = listener.accept()
                link = MachineLink(connection, peer)
                on_failure.callback(link.close)
                _admit(link, connected, terms, machines.count)
        on_failure.pop_all()
    machines.links = [connected[number] for number in sorted(connected)]
    machines.store_listener = socket.create_server((machines.address, 0), family=family)
    machines.store_port = machines.store_listener.getsockname()[1]
    for link in machines.links:
        link.heard_at = time.monotonic()
        link.send(store_port=machines.store_port)
    return machines


def _admit(link: MachineLink, connected: dict[int, MachineLink], terms: Mapping[str, Any], count: int) -> None:
    """Add a new connection to the `connected` machines, or refuse it."""
    hello = link.answer(HELLO_WITHIN_S)
    number = None if hello is None else hello.get("machine")
    # A peer without a valid hello is not a machine of this run.
    if hello is None or type(number) is not int or not 0 < number < count or not isinstance(hello.get("terms"), dict):
        link.close()
        return
    link.machine = number
    for each in [*connected.values()]:
        each.receive()
        if each.is_closed:  # it was stopped, and may connect again
            each.close()
            del connected[each.machine]
    problems = [
        Problem(
            f"{name} = {value_text(hello['terms'].get(name))} on machine {number}",
            f"{value_text(value)}, as on machine 0",
        )
        for name, value in terms.items()
        if hello["terms"].get(name) != value
    ]
    if number in connected:
        problems.append(
            Problem(
                f"machine_rank = {number}: {connected[number].address} has that number",
                "a different number for each machine",
            )
        )
    if problems:
        link.send(refused=[(problem.found, problem.expected) for problem in problems])
        say(f"{link.address} was refused: {' '.join(map(str, problems))}")
        link.close()
    else:
        connected[number] = link


def _connect(machines: Machines, port: int, terms: Mapping[str, Any]) -> Machines:
    """Machines other than 0: connect to machine 0."""
    deadline = time.monotonic() + machines.timeout_s
    main_machine = f"machine 0 at {machines.address}, port {port}"
    say(f"Machine {machines.number} of {machines.count} connects to {main_machine}.")
    reason = ""
    while True:
        stop_if_asked()
        if time.monotonic() > deadline:
            raise RanksError.of(
                f"{main_machine} did not answer for {machines.timeout_s:.0f} s ({reason})",
                remedy="Start the same command there with --machine_rank=0.",
            )
        try:
            connection = socket.create_connection((machines.address, port), CONNECT_AGAIN_S)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
            continue
        link = MachineLink(connection, machines.address)
        link.send(machine=machines.number, terms=dict(terms))
        answer = link.answer(deadline - time.monotonic())
        if answer is not None and ("refused" in answer or isinstance(answer.get("store_port"), int)):
            break
        link.close()
        reason = "it closed the connection" if link.is_closed else "other machines are missing"
        time.sleep(CONNECT_AGAIN_S)
    if "refused" in answer:
        link.close()
        raise ConfigError(*(Problem(finding, expected) for finding, expected in answer["refused"]))
    machines.links, machines.store_port = [link], int(answer["store_port"])
    return machines
