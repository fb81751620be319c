"""`simpletuner server`: its flags, its address, its token, its start and its end."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import uvicorn

from simpletuner.base.errors import ConfigError
from simpletuner.cli import server
from simpletuner.cli.main import main
from simpletuner.server.app import create_app
from simpletuner.server.connections import TimedProtocol
from simpletuner.server.roots import Roots

SECRET = "a-secret-of-thirty-two-characters"


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own, and the line that it printed."""
    command = [sys.executable, "-P", "-m", "simpletuner", "server", *flags]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def port_of(line: str) -> int:
    found = re.search(r":(\d+)/", line)
    assert found is not None, line
    return int(found[1])


def get(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_every_mistake_in_the_flags_is_told_at_once(tmp_path: Path) -> None:
    arguments = [
        "--prt",
        "80",
        "--port=http",
        "--host",
        "--root=none",
        "--allowed-host=a:80",
        "--ssl-cert=x.pem",
        "--port=1",
    ]
    with pytest.raises(ConfigError) as told:
        server.run(arguments)
    text = str(told.value)
    for part in (
        "--prt: no such flag. Did you mean --port?",
        "--host: nothing follows it",
        "--port is given 2 times",
        "--root none: no such folder",
        "--allowed-host = 'a:80'",
        "--ssl-cert alone: expected --ssl-cert and --ssl-key",
    ):
        assert part in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["-1", "65536", "0000001234567", "x", "", "٣"])
def test_a_port_is_a_number(text: str) -> None:
    with pytest.raises(ConfigError, match="--port = "):
        server.run([f"--port={text}"])


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{flag.name.replace('_', '-')}" in shown for flag in fields(server.ServerCommand))


def test_a_taken_port_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="Give another --port") as told:
            server.run([f"--port={port}"])
    assert f"port {port}" in str(told.value)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        server.run(["--host=192.0.2.1", "--port=0"])
    with pytest.raises(ConfigError, match="no such host"):
        server.run(["--host=no host", "--port=0"])


def test_a_certificate_needs_its_key(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no PEM")
    with pytest.raises(ConfigError, match="do not match"):
        server.run(["--ssl-cert=x.pem", "--ssl-key=x.pem"])


def test_a_token_file_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "token"
    made = server._file_token(path)
    assert len(made) >= 43
    assert path.stat().st_mode & 0o777 == 0o600
    assert server._file_token(path) == made
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="other users can read it"):
        server._file_token(path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(ConfigError, match="it contains no token"):
        server._file_token(path)


def test_who_needs_a_token() -> None:
    def knows_owner(address: str, **flags: object) -> bool:
        access = server._access(server.ServerCommand(**flags), address)  # type: ignore[arg-type]
        assert access.token is not None
        return access.trusts_owner

    assert knows_owner("127.0.0.1")
    assert knows_owner("::1")
    assert not knows_owner("0.0.0.0")
    assert not knows_owner("127.0.0.1", allowed_host=("trainer.example",))


def test_it_answers_at_once_and_ends_in_good_order(tmp_path: Path) -> None:
    began = time.monotonic()
    with serving(tmp_path, "--port=0") as (process, line):
        assert get(port_of(line), "/")[0] == 200
        assert time.monotonic() - began < 10  # half a second on an idle core
        assert line.startswith("The page is at http://localhost:")
        assert process.stdout is not None
        others = process.stdout.readline()
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert int(status.partition("VmRSS:")[2].split()[0]) < 80 * 1024
        assert list(tmp_path.iterdir()) == []
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "The page is closed. Runs continue.\n")
    assert re.fullmatch(r"Other users of this machine, .*: http://localhost:\d+/\?token=[\w-]{43}\n", others)


def test_an_open_stream_does_not_keep_it(tmp_path: Path) -> None:
    run = tmp_path / "output" / "mine"
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text("")
    with serving(tmp_path, "--port=0") as (process, line):
        connection = http.client.HTTPConnection("127.0.0.1", port_of(line), timeout=20)
        connection.request("GET", "/api/run/events?run=output/mine&after=0")
        answer = connection.getresponse()
        assert answer.status == 200
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
        connection.close()
    assert (process.returncode, out.splitlines()[-1]) == (0, "The page is closed. Runs continue.")
    assert time.monotonic() - began < 3


def test_away_from_this_machine_the_link_carries_the_token(tmp_path: Path) -> None:
    with serving(tmp_path, "--host=0.0.0.0", "--port=0") as (process, line):
        port, token = port_of(line), line.strip().partition("?token=")[2]
        assert len(token) >= 43
        assert get(port, "/api/about")[0] == 401
        assert get(port, "/api/about", Authorization=f"Bearer {token}")[0] == 200
        assert get(port, f"/?token={token}")[0] == 303
        environment = (
            Path(f"/proc/{process.pid}/environ").read_bytes() + Path(f"/proc/{process.pid}/cmdline").read_bytes()
        )
        assert token.encode() not in environment
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
    assert token not in out


def test_raw_requests_that_no_browser_makes_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, "--port=0") as (_, line):
        port = port_of(line)
        for request in (
            "GET http://evil.example/api/about HTTP/1.1\r\nHost: localhost\r\n",
            "GET http://localhost/api/about HTTP/1.1\r\nHost: evil.example\r\n",
            "GET /api/about HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n",
            "GET /api/about HTTP/1.0\r\n",
            "GET /page/../../app.py HTTP/1.1\r\nHost: localhost\r\n",
            "GET /page/%2e%2e/app.py HTTP/1.1\r\nHost: localhost\r\n",
            "GET /page//etc/passwd HTTP/1.1\r\nHost: localhost\r\n",
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(f"{request}Connection: close\r\n\r\n".encode())
                answer = b""
                while part := connection.recv(65536):
                    answer += part
            assert re.match(rb"HTTP/1\.1 40\d ", answer), request
            assert b"create_app" not in answer
            assert os.fsencode(tmp_path) not in answer


OTHER_USER = 12_345
AS_ANOTHER_USER = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
ASKING = r"""
exec 3<>/dev/tcp/127.0.0.1/$0
printf 'GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "$1" >&3
head -c 12 <&3
"""
LEAVING = r"""
for number in {10..29}; do
    exec 3<>/dev/tcp/127.0.0.1/$0
    printf 'POST /api/folder HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n' >&3
    printf 'Content-Length: 31\r\n\r\n{"path": ".", "name": "left%d"}' $number >&3
    eval "$1"
    exec 3>&-
done
"""


@AS_ANOTHER_USER
def test_another_user_of_the_machine_needs_the_token(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)

    def as_user(uid: int, script: str, *arguments: object) -> str:
        command = ["bash", "-c", script, *map(str, arguments)]
        return subprocess.run(command, user=uid, group=uid, cwd="/", capture_output=True, text=True, check=True).stdout

    with serving(tmp_path, "--port=0") as (process, line):
        port = port_of(line)
        assert process.stdout is not None
        token = process.stdout.readline().strip().partition("?token=")[2]
        assert get(port, "/api/about")[0] == 200
        assert as_user(OTHER_USER, ASKING, port, "/api/about") == "HTTP/1.1 401"
        assert as_user(OTHER_USER, ASKING, port, "/") == "HTTP/1.1 401"
        assert as_user(OTHER_USER, ASKING, port, f"/?token={token}") == "HTTP/1.1 303"
        # The kernel's table shows a socket that is closed already as user 0's.
        as_user(OTHER_USER, LEAVING, port, "")
        as_user(OTHER_USER, LEAVING, port, "head -c 1 <&3")
        assert get(port, "/api/folders")[0] == 200
        assert list(tmp_path.iterdir()) == []
        as_user(os.geteuid(), LEAVING, port, "head -c 1 <&3")
        assert len(list(tmp_path.iterdir())) == 20


def test_a_slow_request_is_closed_and_one_that_pauses_between_requests_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.server.connections.HEADERS_WITHIN_S", 0.3)
    app = create_app(Roots(tmp_path))
    config = uvicorn.Config(app, http=TimedProtocol, ws="none", log_level="warning", lifespan="off")
    listening = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(config)
    thread = threading.Thread(target=uvicorn_server.run, args=([listening],))
    thread.start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", listening.getsockname()[1], timeout=20)
        for _ in range(2):  # of one connection; longer together than a request may take
            connection.request("GET", "/api/about")
            assert connection.getresponse().read()
            time.sleep(0.15)
        connection.sock.sendall(b"GET /api/about HTTP/1.1\r\nHost: localhost\r\n")
        assert connection.sock.recv(65536) == b""
        connection.close()
        with socket.create_connection(listening.getsockname(), timeout=20) as silent:
            assert silent.recv(65536) == b""
    finally:
        uvicorn_server.should_exit = True
        thread.join()
        listening.close()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def planning(pid: int) -> list[int]:
    """The children that are commands of ours already. Before that its parent may be waiting for one to become another
    program (vfork), and would wait for ever if it were stopped."""
    return [child for child in children(pid) if b"plan" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")]


def test_a_check_ends_with_its_client(tmp_path: Path) -> None:
    with serving(tmp_path, "--port=0") as (process, line):
        connection = http.client.HTTPConnection("127.0.0.1", port_of(line), timeout=20)
        body = '{"name": "", "config": "{}"}'
        connection.request("POST", "/api/plan", body, {"Content-Type": "application/json"})
        end = time.monotonic() + 10
        while not planning(process.pid):
            assert time.monotonic() < end
            time.sleep(0.001)
        (child,) = planning(process.pid)
        os.kill(child, signal.SIGSTOP)  # it would be done before anyone sees
        connection.close()
        while children(process.pid):
            assert time.monotonic() < end
            time.sleep(0.02)


def test_the_browser_is_opened_at_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = tmp_path / "browser"
    browser.write_text('#!/bin/sh\necho "$1" > opened\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    with serving(tmp_path, "--port=0", "--host=::1", "--open") as (_, line):
        assert line.startswith("The page is at http://[::1]:")
        end = time.monotonic() + 10
        while not (tmp_path / "opened").is_file() or not (tmp_path / "opened").read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert line == f"The page is at {(tmp_path / 'opened').read_text()}"
