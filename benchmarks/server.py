"""Measure `simpletuner server`: time to its first page, memory, 100,000 events, 20 clients that follow a stream.

    python benchmarks/server.py [--steps 100000] [--clients 20] [--follow_s 20]

Starts the real command on a free port, over a scratch folder with a run of that many steps and another run that still
writes five events a second, and requests pages over plain sockets. Its processor time is what the kernel counts while
the clients follow, heartbeats included. On Linux.
"""

import argparse
import contextlib
import json
import os
import random
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from simpletuner.runs.events import EventLog, RunEvent, StepEvent

EVENTS_PER_S = 5
START_LIMIT_S = 2.0
IDLE_LIMIT_MB = 150
LOAD_LIMIT_S = 0.5
CPU_LIMIT_PERCENT = 2.0


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    value: float
    limit: float | None
    unit: str

    def __str__(self) -> str:
        limit = "" if self.limit is None else f"at most {self.limit:g} {self.unit}"
        verdict = "" if self.limit is None else "kept" if self.value <= self.limit else "EXCEEDED"
        return f"{self.what:<58}{self.value:>9.3f} {self.unit:<4}  {limit:<18}{verdict}".rstrip()


@dataclass(frozen=True)
class Server:
    """The running server."""

    process: subprocess.Popen[str]
    host: str
    port: int
    start_s: float

    def get(self, path: str) -> tuple[float, bytes]:
        """Seconds from a request to the last byte of its response, and the body."""
        began = time.perf_counter()
        with self.asked(path) as connection:
            answer = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"{path}: {answer[:500].decode(errors='replace')}")
        return time.perf_counter() - began, body

    def asked(self, path: str) -> socket.socket:
        """A connection that requested `path`."""
        connection = socket.create_connection((self.host, self.port), timeout=20)
        request = f"GET {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        return connection

    def memory_mb(self) -> float:
        """Its resident memory in 10⁶ bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6

    def cpu_s(self) -> float:
        """Processor time in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--follow_s", type=float, default=20.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="simpletuner-server-") as folder:
        work = Path(folder)
        write_run(work / "output" / "long", asked.steps)
        live = write_run(work / "output" / "live", 1)
        with serving(work) as server:
            figures = list(measured(server, live, asked.steps, asked.clients, asked.follow_s))
    print("\n".join(map(str, figures)))


def measured(server: Server, live: Path, steps: int, clients: int, follow_s: float) -> Iterator[Figure]:
    """All figures, measured in an order in which they disturb each other least."""
    yield Figure("command to the first page", server.start_s, START_LIMIT_S, "s")
    time.sleep(2)
    yield Figure("memory, idle", server.memory_mb(), IDLE_LIMIT_MB, "MB")
    before, began = server.cpu_s(), time.monotonic()
    time.sleep(5)
    yield Figure("one core, idle", share(server, before, began), None, "%")
    seconds = follow(server, live, clients, follow_s)
    yield Figure(f"one core, {clients} clients on {EVENTS_PER_S} events a second", seconds, CPU_LIMIT_PERCENT, "%")
    first, body = server.get("/api/run/series?run=output/long")
    yield Figure(f"curves of {steps:,} steps, first time", first, LOAD_LIMIT_S, "s")
    if json.loads(body)["step"] != list(range(1, steps + 1)):
        raise SystemExit("the curves are not those of the run")
    again = min(server.get("/api/run/series?run=output/long")[0] for _ in range(3))
    yield Figure("the same again", again, LOAD_LIMIT_S, "s")
    yield Figure("size of the answer", len(body) / 1e6, None, "MB")
    yield Figure("detail of that run", server.get("/api/run?run=output/long")[0], None, "s")
    yield Figure("list of runs", server.get("/api/runs")[0], None, "s")
    yield Figure(f"replay of {steps + 1:,} events to one client", replay(server, steps + 1), None, "s")
    yield Figure("memory after it", server.memory_mb(), None, "MB")


def write_run(folder: Path, steps: int) -> Path:
    """The events of a run of `steps`; returns their file."""
    folder.mkdir(parents=True)
    draw = random.Random(steps)
    with EventLog(folder / "events.jsonl") as log:
        log.emit(
            RunEvent(program="simpletuner", pid=1, resumed_from=None, steps=steps, pictures=100, trainable=1_000_000)
        )
        for step in range(1, steps + 1):
            log.emit(event(step, draw))
    return folder / "events.jsonl"


def event(step: int, draw: random.Random) -> StepEvent:
    return StepEvent(
        step=step,
        epoch=step // 100,
        loss=draw.random(),
        lr=1e-4 * draw.random(),
        grad_norm=draw.random(),
        seconds=round(draw.random(), 4),
        memory_gib=round(20 * draw.random(), 3),
    )


@contextlib.contextmanager
def serving(work: Path) -> Iterator[Server]:
    """The real command over `work`, on a free port."""
    command = [sys.executable, "-P", "-m", "simpletuner", "server", "--port=0"]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = urlsplit(line.split()[-1])
        assert url.hostname is not None
        assert url.port is not None
        server = Server(process, url.hostname, url.port, 0.0)
        server.get("/")
        yield Server(process, url.hostname, url.port, time.perf_counter() - began)
    finally:
        process.terminate()
        process.wait(10)


def follow(server: Server, live: Path, clients: int, seconds: float) -> float:
    """Percent of one core while `clients` follow a running run. Each must get every event, in order."""
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        received = {}
        for _ in range(clients):
            connection = stack.enter_context(server.asked(f"/api/run/events?run={quote('output/live')}"))
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)
            received[connection] = bytearray()
        log = stack.enter_context(EventLog(live))
        draw = random.Random(0)
        drain(selector, received, 1.5)
        before, began = server.cpu_s(), time.monotonic()
        step = 1
        while time.monotonic() < began + seconds:
            step += 1
            log.emit(event(step, draw))
            drain(selector, received, began + (step - 1) / EVENTS_PER_S - time.monotonic())
        found = share(server, before, began)
        drain(selector, received, 1.5)
        for sent in received.values():
            ids = [int(line[4:]) for line in bytes(sent).split(b"\n") if line.startswith(b"id: ")]
            if ids != list(range(1, step + 2)):
                raise SystemExit(f"a client got the events {ids[:5]} … {ids[-5:]} of {step + 1}")
        return found


def drain(selector: selectors.BaseSelector, received: dict[socket.socket, bytearray], seconds: float) -> None:
    """Receive for a while."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            assert isinstance(key.fileobj, socket.socket)
            received[key.fileobj] += key.fileobj.recv(1 << 16)


def share(server: Server, before: float, began: float) -> float:
    """Percent of one core since the given measurement."""
    return 100 * (server.cpu_s() - before) / (time.monotonic() - began)


def replay(server: Server, events: int) -> float:
    """Seconds until a new client has all events of the long run."""
    began = time.perf_counter()
    last = f"id: {events}\n".encode()
    tail = b""
    with server.asked(f"/api/run/events?run={quote('output/long')}") as connection:
        while last not in tail:
            tail = tail[-1000:] + connection.recv(1 << 20)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
