"""`simpletuner server`: serve the web page."""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.base.commandline import command_text
from simpletuner.base.console import output_failures_ignored, say
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.files import file_errors_reported, with_home
from simpletuner.base.machine import source_address
from simpletuner.cli.arguments import Flag, parse_command
from simpletuner.config.values import join_names

if TYPE_CHECKING:
    from simpletuner.server.guard import Access

USAGE = """usage: simpletuner server [--host ADDRESS] [--port 8001] [--root FOLDER ...] [--allowed-host NAME ...]
                          [--token-file PATH] [--ssl-cert PEM --ssl-key PEM] [--sampler-idle-minutes 5] [--open]

  Serves the web page for this folder: its configurations, images and runs. Runs continue without the server.
"""

LOOPBACK = "127.0.0.1"
SHUTDOWN_TIMEOUT_S = 2
"""Time limit for unfinished responses when the server shuts down."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")


def _host(text: str) -> str:
    if not text:
        raise ConfigError.of("--host: no address is given", "an address of this machine")
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) <= 65535):
        raise ValueError(text)
    return int(text)


def _root(text: str) -> Path:
    folder = Path(with_home(text))
    if not folder.is_dir():
        raise ConfigError.of(f"--root {text}: no such folder")
    return folder.resolve()


def _host_name(text: str) -> str:
    if _NAME.fullmatch(text) is None:
        raise ValueError(text)
    return text


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 <= minutes <= 1440:
        raise ValueError(text)
    return minutes


def _file(text: str) -> Path:
    return Path(with_home(text))


@dataclass(frozen=True)
class ServerCommand:
    """Arguments of `simpletuner server`."""

    host: str = Flag(
        "listen on this address instead of only on this machine; requires a token and prints the link with it",
        "ADDRESS",
        convert=_host,
    ).default(LOOPBACK)
    port: int = Flag(
        "the port, by default 8001; 0 selects a free one", "PORT", convert=_port, expects="a number from 0 to 65535"
    ).default(8001)
    root: tuple[Path, ...] = Flag(
        "also serve this folder; may be repeated", "FOLDER", convert=_root, is_repeatable=True
    ).default(())
    allowed_host: tuple[str, ...] = Flag(
        "also accept this host name, besides localhost and IP addresses; requires a token",
        "NAME",
        convert=_host_name,
        expects="a name such as trainer.example, without a port",
        is_repeatable=True,
    ).default(())
    token_file: Path | None = Flag(
        "require the token in this file, which stays valid after a restart; the file is created if it does not exist",
        "PATH",
        convert=_file,
    ).default(None)
    ssl_cert: Path | None = Flag("serve HTTPS with this certificate", "PEM", convert=_file).default(None)
    ssl_key: Path | None = Flag("the certificate's private key", "PEM", convert=_file).default(None)
    sampler_idle_minutes: float = Flag(
        "time for which the model stays loaded after sampling; by default 5, 0 frees it at once",
        "MINUTES",
        convert=_minutes,
        expects="a number from 0 to 1440",
    ).default(5.0)
    open: bool = Flag("open the page in the browser").default(False)


FORMS = {"": ServerCommand}


def run(arguments: list[str]) -> int:
    """Serve the page until the process receives INT or TERM.

    Raises:
        ConfigError: a mistake in the flags, or the server cannot listen on the address.
        DiskError: no space for the token.
    """
    command = parse_command(ServerCommand, arguments, check=_tls_problems)
    with contextlib.closing(_listen(command)) as listener, output_failures_ignored():
        return _serve(command, listener)


def _serve(command: ServerCommand, listener: socket.socket) -> int:
    # Imported late, because FastAPI is slow to import: mistakes in the flags are reported first.
    import uvicorn

    from simpletuner.server.app import create_app
    from simpletuner.server.connections import MOST_CONNECTIONS, TimedProtocol
    from simpletuner.server.roots import Roots

    address, port = listener.getsockname()[:2]
    access = _access(command, address)
    url = f"{'https' if access.is_tls else 'http'}://{_shown_host(command, address)}:{port}/"
    token_link = f"{url}?token={access.token}"
    link = url if access.trusts_owner else token_link
    idle_s = 60 * command.sampler_idle_minutes
    app = create_app(Roots(Path.cwd().resolve(), command.root), access, sampler_idle_s=idle_s)
    logging.getLogger("uvicorn.error").addFilter(_is_relevant)
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        limit_concurrency=MOST_CONNECTIONS,
        ws="none",
        log_level="warning",
        access_log=False,  # it would contain the link with the token
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        ssl_certfile=None if command.ssl_cert is None else str(command.ssl_cert),
        ssl_keyfile=None if command.ssl_key is None else str(command.ssl_key),
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            say(f"The page is at {link}")
            if access.trusts_owner:
                say(f"Other users of this machine, and their proxies, need the token: {token_link}")
            if command.open:
                asyncio.get_running_loop().run_in_executor(None, webbrowser.open, link)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Do not wait: a stream of events never ends, and a command's response may take minutes.
            app.state.context.streams.close()
            for task in self.server_state.tasks:
                task.cancel()
            await super().shutdown(sockets)

    server = Server(config)
    with _signals_end_quietly():
        server.run([listener])
    if not server.started:
        return 1
    say("The page is closed. Runs continue.")
    return 0


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Ignore INT and TERM outside of uvicorn's own handlers. uvicorn shuts down on these signals and then raises them
    again."""
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_relevant(record: logging.LogRecord) -> bool:
    """Whether a log message is about anything but a response that the shutdown cancelled."""
    raised = record.exc_info[1] if record.exc_info else None
    return not isinstance(raised, asyncio.CancelledError)


def _access(command: ServerCommand, address: str) -> "Access":
    from simpletuner.server.guard import Access
    from simpletuner.server.peer import reports_users

    is_loopback = ipaddress.ip_address(address).is_loopback
    requires_token = not is_loopback or bool(command.allowed_host) or command.token_file is not None
    token = _new_token() if command.token_file is None else _file_token(command.token_file)
    names = frozenset(name.lower() for name in command.allowed_host)
    return Access(
        is_loopback,
        names,
        token,
        trusts_owner=not requires_token and reports_users(address),
        is_tls=command.ssl_cert is not None,
    )


def _new_token() -> str:
    return secrets.token_urlsafe(32)


def _file_token(path: Path) -> str:
    """The token in the file `path`, which is created if it does not exist.

    Raises:
        ConfigError: the file cannot be read, other users can read it, or it contains no token.
        DiskError: no space for the file.
    """
    with (
        file_errors_reported(path, ConfigError),
        contextlib.suppress(FileExistsError),
        open(path, "x", encoding="ascii", opener=_private) as file,
    ):
        token = _new_token()
        file.write(f"{token}\n")
        return token
    try:
        is_exposed = path.stat().st_mode & 0o077
        token = path.read_bytes()[:1000].decode("ascii", errors="replace").strip()
    except OSError as error:
        raise ConfigError.of(f"--token-file {path}: cannot be read ({error.strerror})") from None
    if is_exposed:
        raise ConfigError.of(f"--token-file {path}: other users can read it", remedy=command_text("chmod", "600", path))
    if _TOKEN.fullmatch(token) is None:
        raise ConfigError.of(
            f"--token-file {path}: it contains no token",
            "16 to 128 letters, digits, - and _",
            "Name a file that does not exist; the server creates it with a new token.",
        )
    return token


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _listen(command: ServerCommand) -> socket.socket:
    """A socket that listens on the command's address and port.

    Raises:
        ConfigError: the address does not exist, belongs to another machine, or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            command.host, command.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError.of(f"--host {command.host}: no such host", "an address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        # Right after a restart, connections of the previous server occupy the port for a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError.of(
            f"cannot listen on {command.host}, port {command.port} ({error.strerror})",
            remedy="Give another --port, or --port 0 for a free one. If simpletuner uses the port, open its page.",
        ) from None
    return listener


def _shown_host(command: ServerCommand, address: str) -> str:
    """The host name or address of this server in the link."""
    if command.allowed_host:
        return command.allowed_host[0]
    ip = ipaddress.ip_address(address)
    if ip.is_loopback:
        return "localhost" if address == LOOPBACK else _bracketed(address)
    return _bracketed(_network_address(ip.version) if ip.is_unspecified else address)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _network_address(version: int) -> str:
    """This machine's address in its network."""
    remote, loopback = ("192.0.2.1", LOOPBACK) if version == 4 else ("2001:db8::1", "::1")
    try:
        return source_address(remote)
    except OSError:
        return loopback


def _tls_problems(command: ServerCommand) -> list[Problem]:
    """Problems of the certificate and its key."""
    certificate, key = command.ssl_cert, command.ssl_key
    named = {name: path for name, path in (("ssl-cert", certificate), ("ssl-key", key)) if path is not None}
    if len(named) == 1:
        return [Problem(f"--{name} alone", join_names(("--ssl-cert", "--ssl-key"), "and")) for name in named]
    missing = [Problem(f"--{name} {path}: no such file") for name, path in named.items() if not path.is_file()]
    if certificate is None or missing:
        return missing
    try:
        # OpenSSL would ask for the password of an encrypted key at the terminal; an empty password makes it an error.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        found = f"--ssl-cert {certificate} and --ssl-key {key} do not match ({error.strerror or error})"
        return [Problem(found, "a certificate and its key as PEM, the key without a password")]
    return []
