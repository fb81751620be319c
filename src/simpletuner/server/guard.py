"""Admit only requests that name this server, are not from another site's page, and are this user's or carry the token.

A browser lets any site's page send requests to this machine. So a request must name this server in its Host header
(another site can point its own domain at this machine), must not come from another site's page, and must have a body
type that a plain HTML form cannot send. This middleware checks all of this before any route runs.
"""

import asyncio
import hmac
import ipaddress
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simpletuner.base.errors import Problem
from simpletuner.base.files import sha256_bytes
from simpletuner.server.faults import FaultAnswer, problem_answer
from simpletuner.server.headers import NO_STORE, REVALIDATE, SECURITY
from simpletuner.server.peer import is_own_user

LARGEST_JSON = 2_000_000
"""Most bytes of a request's JSON body."""
BODY_WITHIN_S = 30.0
"""Time limit for a request's body; it grows by one second for each `SLOWEST_BODY` bytes received."""
SLOWEST_BODY = 10_000
"""Bytes per second."""
GUESSES = 10
"""Number of different wrong tokens within `GUESSES_WITHIN_S` after which requests without the right one are refused
for the same time."""
GUESSES_WITHIN_S = 60.0

RAW_BODIES: dict[tuple[str, str], frozenset[str] | None] = {
    # An HTML form cannot send a PUT.
    ("PUT", "/api/upload"): None,
    ("PUT", "/api/inspect"): None,
    ("POST", "/api/environment/import"): frozenset({"application/zip", "application/json", "application/octet-stream"}),
}
"""Routes that accept other bodies than JSON, and the accepted types; None means any. They limit the size themselves."""

_READING = frozenset({"GET", "HEAD"})
_WRITING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_NEEDS_TOKEN = """\
This page asks for a token.

Open the link that `simpletuner server` printed when it started: it ends in /?token=...
Programs send the token as a header: Authorization: Bearer TOKEN
"""


@dataclass(frozen=True)
class Access:
    """How the server can be reached, and what a request must present."""

    is_loopback: bool = True
    """Bound to a loopback address."""
    hosts: frozenset[str] = frozenset()
    """Accepted host names, in lower case, besides localhost and IP addresses."""
    token: str | None = field(default=None, repr=False)
    """Required of every request; None requires nothing."""
    trusts_owner: bool = False
    """Whether connections by this user or root from this machine need no token."""
    is_tls: bool = False

    def accepts_host(self, host: str) -> bool:
        """Whether the Host header `host` names this server."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].strip("[]").rstrip(".").lower()
        if name == "localhost" or name in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.is_loopback


@dataclass
class Refusal(Exception):
    """Ends a request with `response`."""

    response: Response


def refusal(
    status: int, finding: str, expected: str = "", remedy: str = "", headers: dict[str, str] | None = None
) -> Refusal:
    """Create a refusal in the API's error form."""
    body = FaultAnswer(problems=[problem_answer(Problem(finding, expected, remedy))])
    return Refusal(JSONResponse(body.model_dump(), status_code=status, headers=headers))


class Guard:
    """ASGI middleware: passes the requests that `access` allows, and adds the security headers to every response."""

    def __init__(self, app: ASGIApp, access: Access, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._access = access
        self._clock = clock
        self._guesses: deque[tuple[float, str]] = deque(maxlen=GUESSES)
        self._locked_until = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            # The server has no websockets; closing before accepting refuses.
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"]

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", NO_STORE if path.startswith("/api") else REVALIDATE)
            await send(message)

        try:
            self._check_origin(scope)
            self._check_token(scope)
            receive = await self._checked_body(scope, receive)
        except Refusal as refused:
            await refused.response(scope, receive, secured)
            return
        await self._app(scope, receive, secured)

    def _check_origin(self, scope: Scope) -> None:
        """Refuse requests meant for another server, or made by another site's page."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._access.accepts_host(hosts[0]):
            raise refusal(
                403,
                "the host name in the address does not belong to this server",
                remedy="Use localhost or an IP address, or start the server with --allowed-host NAME.",
            )
        if not scope["path"].startswith("/"):
            raise refusal(400, "the request's path does not begin with a slash")
        foreign = refusal(403, "another site's page made this request", remedy="Open the page of this server itself.")
        origins = headers.getlist("origin")
        for origin in origins:
            parts = urlsplit(origin) if origin.startswith(("http://", "https://")) else None
            if parts is None or parts.netloc.lower() != hosts[0].lower():
                raise foreign
        is_the_page = scope["path"] == "/" and scope["method"] in _READING
        if not is_the_page and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise foreign

    def _check_token(self, scope: Scope) -> None:
        """Refuse requests without the token, if one is required; replace the link that carries it by a cookie."""
        token = self._access.token
        if token is None:
            return
        presented = _presented_tokens(scope)
        valid_sources = {
            source for source, guess in presented if hmac.compare_digest(guess.encode(errors="replace"), token.encode())
        }
        if "link" in valid_sources:
            raise Refusal(self._with_cookie(scope, token))
        if valid_sources or (self._access.trusts_owner and _is_own_user(scope)):
            return
        now = self._clock()
        for _, guess in presented:
            self._count_wrong_token(sha256_bytes(guess.encode(errors="replace")), now)
        if now < self._locked_until:
            retry = {"Retry-After": str(int(self._locked_until - now) + 1)}
            raise refusal(429, "too many wrong tokens", remedy="Wait a minute, then use the right one.", headers=retry)
        challenge = {"WWW-Authenticate": "Bearer"}
        if scope["path"].startswith("/api"):
            raise refusal(401, "no valid token", remedy="Open the link that the server printed.", headers=challenge)
        raise Refusal(PlainTextResponse(_NEEDS_TOKEN, status_code=401, headers=challenge))

    def _count_wrong_token(self, guess: str, now: float) -> None:
        """Record a wrong token. A repeated one, as an open page with an old token sends it, is not a new guess."""
        recent = [entry for entry in self._guesses if now - entry[0] < GUESSES_WITHIN_S]
        if any(guess == earlier for _, earlier in recent):
            return
        self._guesses.append((now, guess))
        if len(recent) + 1 >= GUESSES:
            self._locked_until = now + GUESSES_WITHIN_S
            self._guesses.clear()

    def _with_cookie(self, scope: Scope, token: str) -> Response:
        response = RedirectResponse("/", status_code=303, headers={"Cache-Control": NO_STORE})
        response.set_cookie(
            _cookie_name(scope), token, httponly=True, samesite="strict", secure=self._access.is_tls, path="/"
        )
        return response

    async def _checked_body(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` whose JSON body is within the limit; refuse bodies that an HTML form could send."""
        headers = Headers(scope=scope)
        if scope["method"] not in _WRITING:
            return receive
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        route = (scope["method"], scope["path"])
        receive = _timed(receive)
        if route in RAW_BODIES:
            accepted = RAW_BODIES[route]
            if accepted is not None and media_type not in accepted:
                raise refusal(415, f"a body of type {media_type or 'nothing'!r}", " or ".join(sorted(accepted)))
            return receive
        length = headers.get("content-length", "0")
        too_large = refusal(413, "the request body is too large", f"at most {LARGEST_JSON:,} bytes of JSON")
        if length.isdecimal() and int(length[:20]) > LARGEST_JSON:
            raise too_large
        parts, size, is_more = [], 0, True
        while is_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return _replayed([message], receive)
            parts.append(message)
            size += len(message.get("body", b""))
            if size > LARGEST_JSON:
                raise too_large
            is_more = message.get("more_body", False)
        if size and media_type != "application/json":
            raise refusal(415, f"a body of type {media_type or 'nothing'!r}", "application/json")
        return _replayed(parts, receive)


def _is_own_user(scope: Scope) -> bool:
    client, server = scope.get("client"), scope.get("server")
    return (
        client is not None
        and server is not None
        and server[1] is not None
        and is_own_user(tuple(client), tuple(server))
    )


def _timed(receive: Receive) -> Receive:
    """Wrap `receive`: a body that arrives too slowly ends as if the client had disconnected."""
    began, size, is_more = time.monotonic(), 0, True

    async def timed() -> Message:
        nonlocal size, is_more
        if not is_more:
            return await receive()
        try:
            async with asyncio.timeout(began + BODY_WITHIN_S + size / SLOWEST_BODY - time.monotonic()):
                message = await receive()
        except TimeoutError:
            is_more = False
            return {"type": "http.disconnect"}
        size += len(message.get("body", b""))
        is_more = message.get("more_body", False)
        return message

    return timed


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """Return a `receive` that replays `messages`, then passes on further ones, such as the disconnect."""
    pending = deque(messages)

    async def replayed() -> Message:
        return pending.popleft() if pending else await receive()

    return replayed


def _cookie_name(scope: Scope) -> str:
    """The cookie's name, with the port: cookies ignore ports, so two servers on one machine need two names."""
    server = scope.get("server")
    return f"simpletuner-{server[1]}" if server and server[1] else "simpletuner"


def _presented_tokens(scope: Scope) -> list[tuple[str, str]]:
    """Return the tokens that a request carries, each with its source: link, header or cookie."""
    headers = Headers(scope=scope)
    presented = []
    if scope["path"] == "/" and scope["method"] in _READING:
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        presented += [("link", text) for name, text in query if name == "token"][:1]
    scheme, _, text = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        presented.append(("header", text.strip()))
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        cookies = SimpleCookie()
    if _cookie_name(scope) in cookies:
        presented.append(("cookie", cookies[_cookie_name(scope)].value))
    return presented
