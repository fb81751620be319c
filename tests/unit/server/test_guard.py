"""Who is let in, and what every answer says of itself."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Message

from simpletuner.runs.events import EventLog, StepEvent
from simpletuner.runs.layout import RunDirectory
from simpletuner.server import guard
from simpletuner.server.app import create_app
from simpletuner.server.guard import GUESSES, GUESSES_WITHIN_S, Access, Guard
from simpletuner.server.headers import SECURITY
from simpletuner.server.roots import Roots

ORIGIN = "http://localhost:8001"
TOKEN = "right-token-right-token-right-token"


def guarded(access: Access, clock: Callable[[], float]) -> TestClient:
    inner = FastAPI()

    @inner.get("/api/thing")
    @inner.post("/api/thing")
    async def thing() -> str:
        return "there"

    @inner.get("/")
    async def page() -> str:
        return "page"

    return TestClient(Guard(inner, access, clock), base_url=ORIGIN, follow_redirects=False)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("host", "is_loopback", "status"),
    [
        ("localhost:8001", True, 200),
        ("LOCALHOST", True, 200),
        ("localhost.:8001", True, 200),
        ("127.0.0.1:8001", True, 200),
        ("127.9.9.9", True, 200),
        ("[::1]:8001", True, 200),
        ("192.168.1.2:8001", True, 403),
        ("192.168.1.2:8001", False, 200),
        ("[fe80::1]:8001", False, 200),
        ("evil.example", True, 403),
        ("evil.example:8001", False, 403),
        ("localhost.evil.example", True, 403),
        ("127.0.0.1.evil.example", True, 403),
        ("localhost@evil.example", True, 403),
        ("evil.example#localhost", True, 403),
        ("", True, 403),
        ("trainer.example:8001", False, 200),
        ("Trainer.Example", True, 200),
    ],
)
def test_only_names_of_this_server_are_answered(host: str, is_loopback: bool, status: int) -> None:
    client = guarded(Access(is_loopback, frozenset({"trainer.example"})), Clock())
    assert client.get("/api/thing", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": ORIGIN}, 200),
        ({"Origin": ORIGIN, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "file://localhost:8001"}, 403),
        ({"Origin": "http://localhost:8001.evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_pages_are_refused(headers: dict[str, str], status: int, method: str) -> None:
    assert guarded(Access(), Clock()).request(method, "/api/thing", headers=headers).status_code == status


def test_a_link_to_the_page_may_stand_anywhere() -> None:
    assert guarded(Access(), Clock()).get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; application/json",
    ],
)
def test_a_body_that_a_form_can_send_is_refused(kind: str) -> None:
    client = guarded(Access(), Clock())
    assert client.post("/api/thing", content="{}", headers={"Content-Type": kind}).status_code == 415


def test_a_body_that_comes_too_slowly_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_WITHIN_S", 0.05)

    async def receive() -> Message:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(), "more_body": True}
        return await asyncio.Event().wait() or {}

    async def types() -> list[str]:
        timed = guard._timed(receive)
        return [(await timed())["type"] for _ in range(2)]

    pieces = [b"x" * 100]
    assert asyncio.run(types()) == ["http.request", "http.disconnect"]


def test_a_body_is_read_up_to_its_limit() -> None:
    client = guarded(Access(), Clock())
    json = {"Content-Type": "application/json; charset=utf-8"}
    assert client.post("/api/thing", content=b" " * 1_999_999, headers=json).status_code == 200
    assert client.post("/api/thing", content=b" " * 2_000_001, headers=json).status_code == 413
    in_chunks = client.post("/api/thing", content=iter([b" " * 1_000_000] * 3), headers=json)
    assert in_chunks.status_code == 413
    assert "2,000,000" in in_chunks.json()["problems"][0]["text"]


def everything(client: TestClient) -> list[httpx.Response]:
    return [
        client.get("/"),
        client.get("/api/about"),
        client.get("/api/nothing"),
        client.get("/api/about", headers={"Host": "evil.example"}),
        client.post("/api/environments", content="x"),
        client.get("/page/none.js"),
        client.put("/api/about"),
    ]


def test_every_answer_has_the_headers(client: TestClient) -> None:
    for answer in everything(client):
        assert {name: answer.headers[name] for name in SECURITY} == SECURITY
        assert answer.headers["cache-control"] in ("no-store", "no-cache")
        assert "access-control-allow-origin" not in answer.headers


def test_a_bug_is_answered_without_its_traceback(workspace: Path) -> None:
    app = create_app(Roots(workspace))

    @app.get("/api/bug")
    async def bug() -> None:
        raise RuntimeError("a secret detail")

    answer = TestClient(app, base_url=ORIGIN, raise_server_exceptions=False).get("/api/bug")
    assert answer.status_code == 500
    assert answer.json()["problems"][0]["found"] == "the server failed"
    assert "secret" not in answer.text
    assert answer.headers["content-security-policy"] == SECURITY["Content-Security-Policy"]


def test_the_link_becomes_a_cookie() -> None:
    client = guarded(Access(token=TOKEN), Clock())
    refused = client.get("/")
    assert refused.status_code == 401
    assert refused.headers["content-type"].startswith("text/plain")
    assert "simpletuner server" in refused.text
    assert client.get("/api/thing").json()["problems"]
    entered = client.get("/", params={"token": TOKEN})
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" not in cookie
    assert client.get("/").status_code == 200
    assert client.get("/api/thing").status_code == 200


def test_under_tls_the_cookie_is_for_tls_only() -> None:
    entered = guarded(Access(token=TOKEN, is_tls=True), Clock()).get("/", params={"token": TOKEN})
    assert "Secure" in entered.headers["set-cookie"]


def test_programs_send_the_token_as_a_header() -> None:
    client = guarded(Access(token=TOKEN), Clock())
    assert client.get("/api/thing", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.get("/api/thing", headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401
    assert client.get("/api/thing", params={"token": TOKEN}).status_code == 401  # it would stand in logs and links


def test_guessing_is_stopped_for_a_minute() -> None:
    clock = Clock()
    client = guarded(Access(token=TOKEN), clock)

    def guess(text: str) -> int:
        return client.get("/api/thing", headers={"Authorization": f"Bearer {text}"}).status_code

    assert [guess("stale") for _ in range(3 * GUESSES)] == [401] * 3 * GUESSES  # a page left open is no attack
    assert [guess(f"guess {turn}") for turn in range(GUESSES - 2)] == [401] * (GUESSES - 2)
    assert guess("one more") == 429
    assert client.get("/").status_code == 429
    assert guess(TOKEN) == 200
    clock.now += GUESSES_WITHIN_S
    assert client.get("/").status_code == 401


def test_slow_guesses_are_let_be() -> None:
    clock = Clock()
    client = guarded(Access(token=TOKEN), clock)
    for turn in range(3 * GUESSES):
        clock.now += GUESSES_WITHIN_S / 5
        assert client.get("/", headers={"Authorization": f"Bearer {turn}"}).status_code == 401


def test_the_token_is_in_no_representation() -> None:
    assert TOKEN not in repr(Access(token=TOKEN))


def test_text_is_compressed_and_pictures_and_curves_of_this_machine_are_not(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "output" / "mine")
    run.create()
    run.lora.write_bytes(bytes(2000))
    (run.root / "sheet.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2000))
    with EventLog(run.events) as log:
        for number in range(100):
            log.emit(StepEvent(step=number, epoch=0, loss=0.5, lr=1e-4, grad_norm=1.0, seconds=0.25, memory_gib=2.5))
    app = create_app(Roots(tmp_path), Access(is_loopback=False))
    near = TestClient(app, base_url=ORIGIN, client=("127.0.0.1", 50_000))
    far = TestClient(app, base_url=ORIGIN, client=("192.0.2.7", 50_000))
    plain = {"Accept-Encoding": "identity"}
    for client, path, encoding in [
        (near, "/page/style.css", "gzip"),
        (near, "/api/openapi.json", "gzip"),
        (near, "/api/run/file?run=output/mine&path=sheet.png", None),
        (far, f"/api/run/file?run=output/mine&path={run.lora.name}", None),
        (near, "/api/run/series?run=output/mine", None),
        (far, "/api/run/series?run=output/mine", "gzip"),
    ]:
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers.get("Content-Encoding") == encoding, path
        assert answer.content == client.get(path, headers=plain).content
