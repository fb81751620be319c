"""The page itself, and what it is told of its server."""

import os
from pathlib import Path

from fastapi.testclient import TestClient

from simpletuner import __version__


def test_the_server_says_where_it_works(client: TestClient, workspace: Path) -> None:
    told = client.get("/api/about").json()
    assert told["version"] == __version__
    assert told["workspace"] == str(workspace)
    assert told["roots"] == [str(workspace)]
    assert told["cores"] == os.cpu_count()
    assert told["examples"] == ["tiny-lora"]


def test_the_page_is_served_with_its_parts(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert " style=" not in page.text
    assert "<script>" not in page.text
    assert client.get("/page/main.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/page/style.css").headers["content-type"].startswith("text/css")


def test_what_is_not_there_is_told_in_the_form_of_every_fault(client: TestClient) -> None:
    answer = client.get("/api/nothing")
    assert answer.status_code == 404
    assert answer.json()["problems"][0]["text"] == "Not Found."
    refused = client.put("/api/about")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET")


def test_every_refusal_is_in_the_document(client: TestClient) -> None:
    told = client.get("/api/openapi.json").json()
    fault = {"$ref": "#/components/schemas/FaultAnswer"}
    for methods in told["paths"].values():
        for operation in methods.values():
            assert operation["responses"]["default"]["content"]["application/json"]["schema"] == fault
