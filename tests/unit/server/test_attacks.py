"""A table of attacks, each refused. Operations and parameters come from the OpenAPI document, so that a new one
cannot be forgotten: it fails here until it is told whether it takes a path.

Elsewhere: hosts, origins, tokens and bodies in detail (test_guard), disguised, oversize and packed uploads
(test_files), requests that no browser makes (test_server of the command).
"""

import copy
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from simpletuner.server.app import create_app
from simpletuner.server.guard import GUESSES, RAW_BODIES, Access
from simpletuner.server.roots import Roots

ORIGIN = "http://localhost:8001"
SECRET = "the-secret-outside"

PATHS = {"path", "folder", "run", "names", "beside", "references", "partners"}
"""Parameters that name a file or folder, or several."""
NAMES = {"name", "new_name", "source", "environment", "example", "confirm", "job_id"}
"""Parameters that name something of ours, and become part of a path or a command."""
NEITHER = {"document", "kind", "text", "revision", "config", "datasets", "prompts", "devices", "options"} | {
    "seen",
    "to",
    "if-none-match",
    "last-event-id",
    # Of a change of captions.
    "numbered",
    "missing",
    "find",
    "replace",
    "prepend",
    "append",
    "what",
    "format",
    "mask",
}
"""Parameters with values of a list, texts, and what is compared only."""

HARMLESS: dict[str, Any] = {
    "path": "one.png",
    "folder": "inner",
    "beside": "inner",
    "partners": ["inner"],
    "numbered": "false",
    "run": "output/mine",
    "name": "mine",
    "new_name": "other",
    "source": "mine",
    "environment": "mine",
    "example": None,
    "job_id": "none",
    "document": "config",
    "kind": "empty",
    "confirm": "no",
    "config": "{}",
    "datasets": None,
    "prompts": None,
    "options": {},
    "devices": "",
    "text": "",
    "missing": "false",
    "what": "captions",
    "format": "kohya",
    "revision": "",
    "seen": None,
    "to": "top",
    "if-none-match": "",
    "last-event-id": "0",
}


@dataclass(frozen=True)
class Operation:
    """One line of the OpenAPI document."""

    method: str
    path: str
    parameters: tuple[tuple[str, str], ...]
    """Name and place of each: query, path or header."""
    body: Any
    """A harmless JSON body; None without one."""
    strings: tuple[tuple[str | int, ...], ...]
    """Where in the body texts stand."""

    @property
    def is_raw(self) -> bool:
        return (self.method, self.path) in RAW_BODIES

    @property
    def takes_anything(self) -> bool:
        """Whether it is a PUT, which no form can send, with a body of any type."""
        return self.is_raw and RAW_BODIES[self.method, self.path] is None

    def send(
        self, client: TestClient, *, at: str = "", value: str = "", pointer: tuple[str | int, ...] = (), **more: Any
    ) -> Any:
        """This request, harmless but for `value` in one place."""
        query, headers, path = {}, dict(more.pop("headers", {})), self.path
        for name, place in self.parameters:
            sent = value if name == at else HARMLESS.get(name, 1)
            if place == "path":
                path = path.replace(f"{{{name}}}", quote(str(sent), safe=""))
            elif place == "query":
                query[name] = sent
        if "content" not in more and self.body is not None:
            body = copy.deepcopy(self.body)
            if pointer:
                inner = body
                for key in pointer[:-1]:
                    inner = inner[key]
                inner[pointer[-1]] = value
            more["json"] = body
        elif self.is_raw and "content" not in more:
            more["content"] = b"x"
            headers.setdefault("Content-Type", "application/zip")
        return client.request(self.method, path, params=query, headers=headers, **more)


def document() -> Any:
    return create_app(Roots(Path("/nowhere"))).openapi()


def filled(schema: Any, schemas: Any, name: str = "") -> Any:
    """A harmless value of this schema."""
    if "$ref" in schema:
        return filled(schemas[schema["$ref"].rpartition("/")[2]], schemas, name)
    if name in HARMLESS:
        return HARMLESS[name]
    if "anyOf" in schema:
        return filled(schema["anyOf"][0], schemas, name)
    kind = schema.get("type", "string")
    if kind == "object":
        return {key: filled(inner, schemas, key) for key, inner in schema.get("properties", {}).items()}
    if kind == "array":
        return [filled(schema["items"], schemas, name)]
    return {"string": "x", "integer": 64, "number": 1.0, "boolean": False}[kind]


def texts(value: Any, pointer: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where texts stand in a body, and what may be one."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from texts(inner, (*pointer, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from texts(inner, (*pointer, index))
    elif isinstance(value, str | dict | None):
        yield pointer


def operations() -> list[Operation]:
    """Every operation of the API."""
    told = document()
    schemas = told["components"]["schemas"]
    found = []
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            parameters = tuple((one["name"], one["in"]) for one in operation.get("parameters", []))
            content = operation.get("requestBody", {}).get("content", {})
            is_json = list(content) == ["application/json"]
            body = filled(content["application/json"]["schema"], schemas) if is_json else None
            strings = () if body is None else tuple(texts(body))
            found.append(Operation(method.upper(), path, parameters, body, strings))
    return found


OPERATIONS = operations()
IDS = [f"{operation.method} {operation.path}" for operation in OPERATIONS]


def last_key(pointer: tuple[str | int, ...]) -> str:
    return str([key for key in pointer if isinstance(key, str)][-1])


def parameters_of(kinds: set[str]) -> list[Any]:
    """Each place where a parameter of these names stands."""
    places: list[tuple[Operation, str, dict[str, Any]]] = []
    for operation in OPERATIONS:
        places += [(operation, name, {"at": name}) for name, _ in operation.parameters]
        places += [(operation, last_key(pointer), {"pointer": pointer}) for pointer in operation.strings]
    return [
        pytest.param(operation, place, id=f"{operation.method} {operation.path} {name}")
        for operation, name, place in places
        if name in kinds
    ]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must neither be read nor changed."""
    folder = tmp_path / "outside"
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    for name in ("one.png", "one.txt", "config.json", "events.jsonl", "checkpoints/step-000001/manifest.json"):
        (folder / name).write_text(SECRET)
    return folder


@pytest.fixture
def attacked(client: TestClient, workspace: Path, outside: Path) -> TestClient:
    """A server over a workspace with something of everything, and links that lead out of it."""
    (workspace / "inner").mkdir()
    (workspace / "one.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (workspace / "config" / "mine").mkdir(parents=True)
    (workspace / "config" / "mine" / "config.json").write_text("{}")
    run = workspace / "output" / "mine"
    (run / "checkpoints").mkdir(parents=True)
    (run / "events.jsonl").write_text("")
    (run / "config.json").write_text("{}")
    (workspace / "link").symlink_to(outside)
    (workspace / "link.png").symlink_to(outside / "one.png")
    for hidden in (".git", ".simpletuner/queue", "inner/.hidden", "output/mine/.hidden"):
        (workspace / hidden).mkdir(parents=True)
        for name in ("one.png", "one.txt", "config.json", "events.jsonl"):
            (workspace / hidden / name).write_text(SECRET)
    (workspace / "visible").symlink_to(".git")
    for pipe in ("pipe.png", "pipe.safetensors", "output/mine/pipe.json"):
        os.mkfifo(workspace / pipe)
    (workspace / "piped" / "control").mkdir(parents=True)
    os.mkfifo(workspace / "piped" / "events.jsonl")
    (run / "link").symlink_to(outside)
    return client


def contents(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode)}


def test_every_parameter_is_told_apart() -> None:
    names = {name for operation in OPERATIONS for name, _ in operation.parameters}
    names |= {last_key(pointer) for operation in OPERATIONS for pointer in operation.strings}
    numbers = {"width", "height", "after", "step", "id", "seed", "steps", "count", "guidance", "strength"}
    assert names - PATHS - NAMES - NEITHER - numbers - {"vram_gib", "ram_gib", "gpus"} == set()


@pytest.mark.parametrize(("operation", "place"), parameters_of(PATHS))
def test_no_path_leads_out(
    attacked: TestClient, operation: Operation, place: dict[str, Any], outside: Path, workspace: Path
) -> None:
    before, within = contents(outside), contents(workspace)
    for value in (
        "..",
        "../outside",
        "../outside/one.png",
        "inner/../../outside/one.png",
        "output/mine/../../../outside",
        str(outside),
        str(outside / "one.png"),
        "/etc/passwd",
        "/proc/self/environ",
        "~/../outside",
        "link",
        "link/one.png",
        "link.png",
        "output/mine/link",
        ".git",
        ".git/one.png",
        ".simpletuner/queue",
        ".simpletuner/queue/config.json",
        "inner/.hidden",
        "inner/.hidden/one.png",
        "inner/../.git/one.png",
        "output/mine/.hidden",
        "output/mine/.hidden/config.json",
        "visible",
        "visible/one.png",
        "pipe.png",
        "pipe.safetensors",
        "output/mine/pipe.json",
        "pipe.json",
        "one.png\0.txt",
        "\0",
        "a" * 300,
        "a/" * 2000,
        "a" * 5000,
    ):
        answer = operation.send(attacked, value=value, **place)
        assert answer.status_code in (403, 404, 422), (value, answer.status_code, answer.text)
        assert answer.json()["problems"]
        assert SECRET not in answer.text
    assert contents(outside) == before
    assert contents(workspace) == within


@pytest.mark.parametrize(("operation", "place"), parameters_of(NAMES))
def test_no_name_leads_out_or_becomes_a_flag(
    attacked: TestClient, operation: Operation, place: dict[str, Any], outside: Path, workspace: Path
) -> None:
    before, within = contents(outside), contents(workspace)
    for value in (
        "../../outside",
        "..",
        "/etc",
        "mine/../../../outside",
        "a\0b",
        "a\r\nX-Evil: 1",
        "--config=/etc/passwd",
        "-h",
        "mine; touch x",
        "$(touch x)",
        ".hidden",
    ):
        answer = operation.send(attacked, value=value, **place)
        if operation.path == "/api/upload":  # a file that is refused is named in a good answer
            assert answer.json()["saved"] == []
            assert answer.json()["refused"]
        elif answer.status_code == 201:  # `/api/folder` may make a folder of a strange name in its place
            assert operation.path == "/api/folder"
            (workspace / value).rmdir()
        else:
            assert answer.status_code in (403, 404, 409, 422), (value, answer.status_code, answer.text)
        assert "x-evil" not in answer.headers
        assert SECRET not in answer.text
    assert contents(outside) == before
    assert contents(workspace) == within


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example:8001"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
    ids=["rebinding", "a longer name", "elsewhere", "null", "another port", "cross-site"],
)
def test_other_pages_are_refused(attacked: TestClient, headers: dict[str, str]) -> None:
    answers = {operation.send(attacked, headers=headers).status_code for operation in OPERATIONS}
    assert answers == {403}


@pytest.mark.parametrize(
    "operation", [one for one in OPERATIONS if one.method != "GET" and not one.takes_anything], ids=str
)
def test_a_form_of_another_page_is_no_request(attacked: TestClient, operation: Operation) -> None:
    body = json.dumps(operation.body).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert operation.send(attacked, content=body, headers={"Content-Type": kind}).status_code == 415


@pytest.mark.parametrize("operation", [one for one in OPERATIONS if one.method != "GET" and not one.is_raw], ids=str)
def test_an_oversize_body_is_refused(attacked: TestClient, operation: Operation) -> None:
    headers = {"Content-Type": "application/json"}
    assert operation.send(attacked, content=b" " * 2_000_001, headers=headers).status_code == 413


def test_an_oversize_import_is_refused(attacked: TestClient) -> None:
    (operation,) = (one for one in OPERATIONS if one.path == "/api/environment/import")
    body = b'{"a": "' + b"x" * 4_000_000 + b'"}'
    assert (
        operation.send(
            attacked, at="name", value="new", content=body, headers={"Content-Type": "application/json"}
        ).status_code
        == 413
    )


def test_everything_needs_the_token_where_there_is_one(workspace: Path) -> None:
    with TestClient(create_app(Roots(workspace), Access(token="right")), base_url=ORIGIN) as client:
        assert {operation.send(client).status_code for operation in OPERATIONS} == {401}
        for turn in range(GUESSES):
            client.get("/api/about", headers={"Authorization": f"Bearer {turn}"})
        assert {operation.send(client).status_code for operation in OPERATIONS} == {429}
        assert client.get("/page/index.html").status_code == 429
        assert client.get("/api/about", headers={"Authorization": "Bearer right"}).status_code == 200


def test_names_of_files_do_not_become_headers(attacked: TestClient, workspace: Path) -> None:
    run = workspace / "output" / "mine"
    for name in ('a"; X-Evil=1.json', "a\r\nX-Evil: 1.json", "a\nX-Evil: 1.json", "über.json"):
        (run / name).write_text("{}")
        answer = attacked.get("/api/run/file", params={"run": "output/mine", "path": name})
        assert answer.status_code in (200, 403, 404, 422)
        assert "x-evil" not in answer.headers
        disposition = answer.headers.get("content-disposition", "")
        assert "\n" not in disposition
        assert disposition.count('"') in (0, 2)


def test_half_a_character_is_refused(attacked: TestClient) -> None:
    for operation in OPERATIONS:
        for pointer in operation.strings:
            body = copy.deepcopy(operation.body)
            inner = body
            for key in pointer[:-1]:
                inner = inner[key]
            inner[pointer[-1]] = "\ud800"
            headers = {"Content-Type": "application/json"}
            answer = operation.send(attacked, content=json.dumps(body).encode(), headers=headers)
            assert answer.status_code in (403, 404, 409, 422), (operation, pointer, answer.text)


def test_no_page_of_the_server_is_outside_its_folder(attacked: TestClient) -> None:
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd", "/page/%00"):
        answer = attacked.get(path)
        assert answer.status_code in (404, 405), path
        assert "create_app" not in answer.text


def test_a_link_made_after_the_start_is_not_followed(attacked: TestClient, workspace: Path, outside: Path) -> None:
    os.symlink(outside, workspace / "inner" / "late")
    assert attacked.get("/api/folders", params={"path": "inner/late"}).status_code == 403
    assert attacked.get("/api/folders", params={"path": "inner"}).json()["folders"] == []


@pytest.mark.parametrize("operation", [one for one in OPERATIONS if ("run", "query") in one.parameters], ids=str)
def test_a_pipe_in_the_place_of_a_runs_events_is_no_run(attacked: TestClient, operation: Operation) -> None:
    assert operation.send(attacked, at="run", value="piped").status_code in (404, 422)
