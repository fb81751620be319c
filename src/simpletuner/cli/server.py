"""`simpletuner server`: the page."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import secrets
import signal
import socket
import ssl
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.files import disk_full_is_reported
from simpletuner.config.values import join_names, nearest

if TYPE_CHECKING:
    from simpletuner.server.guard import Access

USAGE = """usage: simpletuner server [--host ADDRESS] [--port 8001] [--root FOLDER ...] [--allowed-host NAME ...]
                          [--token-file PATH] [--ssl-cert PEM --ssl-key PEM] [--open]

  Serves the page over this folder: its configurations, pictures and runs. Runs do not depend on it.

  --host ADDRESS       listen here instead of on this machine alone; a token is then asked for, and the link with it
                       is printed
  --port PORT          8001 by default; 0 takes a free one
  --root FOLDER        also show this folder; may be given more than once
  --allowed-host NAME  also answer to this name, besides localhost and IP addresses; asks for a token too
  --token-file PATH    ask for the token in this file, and keep it over restarts; it is made if it is not there
  --ssl-cert PEM       serve HTTPS with this certificate
  --ssl-key PEM        and this key
  --open               open the page in the browser"""

VALUED = ("host", "port", "root", "allowed-host", "token-file", "ssl-cert", "ssl-key")
REPEATED = ("root", "allowed-host")
LOOPBACK = "127.0.0.1"
PORT = 8001
LAST_WORDS_S = 2
"""How long an answer may take to end once the server is told to."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")


@dataclass
class Request:
    """What was typed after `simpletuner server`."""

    host: str = LOOPBACK
    port: int = PORT
    roots: list[Path] = field(default_factory=list)
    allowed_hosts: list[str] = field(default_factory=list)
    token_file: Path | None = None
    ssl_cert: Path | None = None
    ssl_key: Path | None = None
    opens: bool = False


def run(arguments: list[str]) -> int:
    """Serve the page until it is told to end.

    Raises:
        ConfigError: a mistake in the flags, or an address that cannot be listened at.
        DiskError: no space for the token.
    """
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    request = _parsed(arguments)
    with contextlib.closing(_listening(request)) as listening:
        return _serve(request, listening)


def _serve(request: Request, listening: socket.socket) -> int:
    # FastAPI and all that it brings: once the flags are known to be good.
    import uvicorn

    from simpletuner.server.app import create_app
    from simpletuner.server.roots import Roots

    address, port = listening.getsockname()[:2]
    access = _access(request, address)
    url = f"{'https' if access.is_tls else 'http'}://{_shown_host(request, address)}:{port}/"
    link = url if access.token is None else f"{url}?token={access.token}"
    app = create_app(Roots(Path.cwd().resolve(), tuple(request.roots)), access)
    logging.getLogger("uvicorn.error").addFilter(_is_no_farewell)
    config = uvicorn.Config(
        app,
        ws="none",
        log_level="warning",
        access_log=False,  # the link with the token would stand in it
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=LAST_WORDS_S,
        ssl_certfile=None if request.ssl_cert is None else str(request.ssl_cert),
        ssl_keyfile=None if request.ssl_key is None else str(request.ssl_key),
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"The page is at {link}", flush=True)
            if request.opens:
                asyncio.get_running_loop().run_in_executor(None, webbrowser.open, link)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # A stream of events has no end to wait for, and a command's answer may take minutes.
            app.state.context.streams.close()
            for task in self.server_state.tasks:
                task.cancel()
            await super().shutdown(sockets)

    server = Server(config)
    with _signals_end_quietly():
        server.run([listening])
    if not server.started:
        return 1
    print("The page is closed. Runs go on.", flush=True)
    return 0


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Inside, INT and TERM are for uvicorn, which ends in good order and sends itself the signal once more after it:
    here that does nothing."""
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_no_farewell(record: logging.LogRecord) -> bool:
    """Whether a message is about more than an answer that was cut off because the server ends."""
    raised = record.exc_info[1] if record.exc_info else None
    return not isinstance(raised, asyncio.CancelledError)


def _access(request: Request, address: str) -> "Access":
    from simpletuner.server.guard import Access

    is_loopback = ipaddress.ip_address(address).is_loopback
    token = None
    if request.token_file is not None:
        token = _token_in(request.token_file)
    elif not is_loopback or request.allowed_hosts:
        token = _new_token()
    names = frozenset(name.lower() for name in request.allowed_hosts)
    return Access(is_loopback, names, token, is_tls=request.ssl_cert is not None)


def _new_token() -> str:
    return secrets.token_urlsafe(32)


def _token_in(path: Path) -> str:
    """The token that is kept in `path`, made there where it is absent.

    Raises:
        ConfigError: it cannot be read, others can read it, or it holds no token.
        DiskError: no space for it.
    """
    try:
        with disk_full_is_reported(path), open(path, "x", encoding="ascii", opener=_private) as file:
            made = _new_token()
            file.write(f"{made}\n")
            return made
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError.of(f"--token-file {path}: cannot be made ({error.strerror})") from None
    try:
        others_may = path.stat().st_mode & 0o077
        token = path.read_bytes()[:1000].decode("ascii", errors="replace").strip()
    except OSError as error:
        raise ConfigError.of(f"--token-file {path}: cannot be read ({error.strerror})") from None
    if others_may:
        raise ConfigError.of(f"--token-file {path}: others may read it", remedy=f"chmod 600 {path}")
    if _TOKEN.fullmatch(token) is None:
        raise ConfigError.of(
            f"--token-file {path}: no token in it",
            "16 to 128 letters, digits, - and _",
            "Name a file that is not there yet, and one is made.",
        )
    return token


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _listening(request: Request) -> socket.socket:
    """A socket at the address, from which on nobody else can take it.

    Raises:
        ConfigError: the address is no one's, not this machine's or taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            request.host, request.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError.of(f"--host {request.host}: no such host", "an address of this machine") from None
    listening = socket.socket(family, kind, protocol)
    try:
        # Right after a restart, connections of the last server still hold the port for a minute.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        raise ConfigError.of(
            f"cannot listen at {request.host}, port {request.port} ({error.strerror})",
            remedy="Give another --port, or --port 0 for a free one; if it is this server, its page is there already.",
        ) from None
    return listening


def _shown_host(request: Request, address: str) -> str:
    """The host of the link: where a browser finds this server."""
    if request.allowed_hosts:
        return request.allowed_hosts[0]
    found = ipaddress.ip_address(address)
    if found.is_loopback:
        return "localhost" if address == LOOPBACK else _bracketed(address)
    return _bracketed(_own_address(found.version) if found.is_unspecified else address)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _own_address(version: int) -> str:
    """This machine's address in its network. Nothing is sent: the system only says which way it would go."""
    family, elsewhere, loopback = (
        (socket.AF_INET, "192.0.2.1", LOOPBACK) if version == 4 else (socket.AF_INET6, "2001:db8::1", "::1")
    )
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((elsewhere, 9))
        except OSError:
            return loopback
        return str(probe.getsockname()[0])


def _parsed(arguments: Sequence[str]) -> Request:
    """What was typed.

    Raises:
        ConfigError: every mistake.
    """
    given: dict[str, list[str]] = {}
    problems = []
    request = Request()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if word == "--open":
            request.opens = True
        elif not word.startswith("--") or name not in VALUED:
            near = nearest(name, (*VALUED, "open"))
            problems.append(
                Problem(f"{word}: no such flag", remedy=f"Did you mean --{near}?" if near else "See --help.")
            )
        elif not has_value and (not rest or rest[0].startswith("--")):
            problems.append(Problem(f"--{name}: nothing follows it", "a value"))
        else:
            given.setdefault(name, []).append(value if has_value else rest.pop(0))
    problems += [
        Problem(f"--{name} is given {len(values)} times", "once")
        for name, values in given.items()
        if len(values) > 1 and name not in REPEATED
    ]
    last = {name: values[-1] for name, values in given.items()}
    request.host = last.get("host", LOOPBACK)
    if not request.host:
        problems.append(Problem("--host: nothing is named", "an address of this machine"))
    if "port" in last:
        text = last["port"]
        if text.isascii() and text.isdecimal() and int(text[:6]) <= 65535:
            request.port = int(text)
        else:
            problems.append(Problem(f"--port = {text!r}", "a number from 0 to 65535"))
    for text in given.get("root", []):
        folder = Path(text).expanduser()
        if folder.is_dir():
            request.roots.append(folder.resolve())
        else:
            problems.append(Problem(f"--root {text}: no such folder"))
    for text in given.get("allowed-host", []):
        if _NAME.fullmatch(text):
            request.allowed_hosts.append(text)
        else:
            problems.append(Problem(f"--allowed-host = {text!r}", "a name such as trainer.example, without a port"))
    if "token-file" in last:
        request.token_file = Path(last["token-file"]).expanduser()
    problems += _tls(request, last)
    ConfigError.raise_if(problems)
    return request


def _tls(request: Request, last: dict[str, str]) -> list[Problem]:
    """Take over certificate and key; the problems with them."""
    names = [name for name in ("ssl-cert", "ssl-key") if name in last]
    if not names:
        return []
    if len(names) == 1:
        return [Problem(f"--{names[0]} alone", join_names(("--ssl-cert", "--ssl-key"), "and"))]
    certificate, key = (Path(last[name]).expanduser() for name in names)
    named = {"ssl-cert": certificate, "ssl-key": key}
    missing = [Problem(f"--{name} {path}: no such file") for name, path in named.items() if not path.is_file()]
    if missing:
        return missing
    request.ssl_cert, request.ssl_key = certificate, key
    try:
        # A key with a password would be asked for at the terminal: an empty one makes it an error.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        found = f"--ssl-cert {certificate} and --ssl-key {key} do not go together ({error.strerror or error})"
        return [Problem(found, "a certificate and its key as PEM, the key without a password")]
    return []
