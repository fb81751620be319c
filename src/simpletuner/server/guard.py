"""Who may ask: the host that was meant, pages of our own, and this user, or whoever holds the token.

A browser carries other pages' requests to this machine too. So a request counts only if its Host is a name of this
server (a page elsewhere can point its own name at this machine), if no other page made it, and if its body is of a
kind that no plain form can send. It is checked here, before any route, for all of them.
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
from simpletuner.server.faults import FaultAnswer, answered
from simpletuner.server.headers import ASKED_AGAIN, NOT_KEPT, SECURITY
from simpletuner.server.peer import is_own

LARGEST_JSON = 2_000_000
"""Bytes of a request's JSON."""
BODY_WITHIN_S = 30.0
"""How long a request's body may take, and"""
SLOWEST_BODY = 10_000
"""one second more for so many bytes that have arrived."""
GUESSES = 10
"""Different wrong tokens within `GUESSES_WITHIN_S`; then nobody without the right one is answered for as long."""
GUESSES_WITHIN_S = 60.0

RAW_BODIES: dict[tuple[str, str], frozenset[str] | None] = {
    # No form can send a PUT.
    ("PUT", "/api/upload"): None,
    ("PUT", "/api/inspect"): None,
    ("POST", "/api/environment/import"): frozenset({"application/zip", "application/json", "application/octet-stream"}),
}
"""Routes that take other bodies than JSON, and which; None is any. They limit the size themselves."""

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
    """From where the server can be reached, and what for."""

    is_loopback: bool = True
    """Bound to this machine alone."""
    hosts: frozenset[str] = frozenset()
    """Names, in small letters, that count beside localhost and IP addresses."""
    token: str | None = field(default=None, repr=False)
    """What everyone must show; None is nothing."""
    knows_owner: bool = False
    """Connections that this user, or root, makes from this machine need no token."""
    is_tls: bool = False

    def knows(self, host: str) -> bool:
        """Whether `host`, the header, names this server."""
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
    """Ends a request here."""

    response: Response


def refusal(
    status: int, found: str, expected: str = "", remedy: str = "", headers: dict[str, str] | None = None
) -> Refusal:
    """A refusal in the form of every fault of the API."""
    body = FaultAnswer(problems=[answered(Problem(found, expected, remedy))])
    return Refusal(JSONResponse(body.model_dump(), status_code=status, headers=headers))


class Guard:
    """ASGI middleware: lets through what `access` allows, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, access: Access, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._access = access
        self._clock = clock
        self._guesses: deque[tuple[float, str]] = deque(maxlen=GUESSES)
        self._closed_until = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            # There are no websockets here; closing before accepting refuses.
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"]

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", NOT_KEPT if path.startswith("/api") else ASKED_AGAIN)
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
        """Refuse what was meant for another server, or made by another page."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._access.knows(hosts[0]):
            raise refusal(
                403,
                "this server is not known by the name in the address",
                remedy="Use localhost or an IP address, or start the server with --allowed-host NAME.",
            )
        if not scope["path"].startswith("/"):
            raise refusal(400, "the request names no path of this server")
        foreign = refusal(403, "another page made this request", remedy="Open the page of this server itself.")
        origins = headers.getlist("origin")
        for origin in origins:
            parts = urlsplit(origin) if origin.startswith(("http://", "https://")) else None
            if parts is None or parts.netloc.lower() != hosts[0].lower():
                raise foreign
        is_the_page = scope["path"] == "/" and scope["method"] in _READING
        if not is_the_page and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise foreign

    def _check_token(self, scope: Scope) -> None:
        """Refuse who has no token, where one is needed; turn the link that carries it into a cookie."""
        token = self._access.token
        if token is None:
            return
        shown = _shown(scope)
        right = {way for way, guess in shown if hmac.compare_digest(guess.encode(errors="replace"), token.encode())}
        if "link" in right:
            raise Refusal(self._with_cookie(scope, token))
        if right or (self._access.knows_owner and _is_own(scope)):
            return
        now = self._clock()
        for _, guess in shown:
            self._count(sha256_bytes(guess.encode(errors="replace")), now)
        if now < self._closed_until:
            wait = {"Retry-After": str(int(self._closed_until - now) + 1)}
            raise refusal(429, "too many wrong tokens", remedy="Wait a minute, then use the right one.", headers=wait)
        ask = {"WWW-Authenticate": "Bearer"}
        if scope["path"].startswith("/api"):
            raise refusal(401, "no valid token", remedy="Open the link that the server printed.", headers=ask)
        raise Refusal(PlainTextResponse(_NEEDS_TOKEN, status_code=401, headers=ask))

    def _count(self, guess: str, now: float) -> None:
        """Note a wrong token. The same one again, as a page that was left open sends it, is no new guess."""
        recent = [known for known in self._guesses if now - known[0] < GUESSES_WITHIN_S]
        if any(guess == known for _, known in recent):
            return
        self._guesses.append((now, guess))
        if len(recent) + 1 >= GUESSES:
            self._closed_until = now + GUESSES_WITHIN_S
            self._guesses.clear()

    def _with_cookie(self, scope: Scope, token: str) -> Response:
        response = RedirectResponse("/", status_code=303, headers={"Cache-Control": NOT_KEPT})
        response.set_cookie(
            _cookie_name(scope), token, httponly=True, samesite="strict", secure=self._access.is_tls, path="/"
        )
        return response

    async def _checked_body(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, with a JSON body that is not too large; refuse what a plain form could send."""
        headers = Headers(scope=scope)
        if scope["method"] not in _WRITING:
            return receive
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        route = (scope["method"], scope["path"])
        receive = _timed(receive)
        if route in RAW_BODIES:
            kinds = RAW_BODIES[route]
            if kinds is not None and kind not in kinds:
                raise refusal(415, f"a body of type {kind or 'nothing'!r}", " or ".join(sorted(kinds)))
            return receive
        length = headers.get("content-length", "0")
        too_large = refusal(413, "the request is too large", f"at most {LARGEST_JSON:,} bytes of JSON")
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
        if size and kind != "application/json":
            raise refusal(415, f"a body of type {kind or 'nothing'!r}", "application/json")
        return _replayed(parts, receive)


def _is_own(scope: Scope) -> bool:
    client, server = scope.get("client"), scope.get("server")
    return client is not None and server is not None and server[1] is not None and is_own(tuple(client), tuple(server))


def _timed(receive: Receive) -> Receive:
    """`receive`, but a body that comes too slowly breaks off as if its client had gone away."""
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
    """Gives `messages` first, then what else comes: that the client went away."""
    left = deque(messages)

    async def replayed() -> Message:
        return left.popleft() if left else await receive()

    return replayed


def _cookie_name(scope: Scope) -> str:
    """Cookies do not heed ports: two servers of one machine need two names."""
    server = scope.get("server")
    return f"simpletuner-{server[1]}" if server and server[1] else "simpletuner"


def _shown(scope: Scope) -> list[tuple[str, str]]:
    """The tokens that a request carries, and how: link, header or cookie."""
    headers = Headers(scope=scope)
    found = []
    if scope["path"] == "/" and scope["method"] in _READING:
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        found += [("link", text) for name, text in query if name == "token"][:1]
    scheme, _, text = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found.append(("header", text.strip()))
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        cookies = SimpleCookie()
    if _cookie_name(scope) in cookies:
        found.append(("cookie", cookies[_cookie_name(scope)].value))
    return found
