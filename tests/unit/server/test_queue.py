"""The queue over the API: as the shell has it."""

import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from simpletuner.runs.queue import Queue

SAME = {"Origin": "http://localhost:8001"}


def test_an_empty_queue(client: TestClient, workspace: Path) -> None:
    assert client.get("/api/queue").json() == []
    assert not (workspace / ".simpletuner").exists()


def test_entries_say_what_they_train(client: TestClient, workspace: Path) -> None:
    queue = Queue.of(workspace)
    queue.add(["--env=mine", "--lora_rank=4"], "output/mine", "0,1")
    queue.add(["--config=config/config.json"], "output/flux2")
    queue.add(["--example=tiny-lora"], "output/tiny-lora")
    queue.add(["--config=elsewhere.json"], "output/else")
    found = client.get("/api/queue").json()
    assert [(one["environment"], one["example"], one["devices"], one["state"]) for one in found] == [
        ("mine", None, "0,1", "waiting"),
        ("", None, "", "waiting"),
        (None, "tiny-lora", "", "waiting"),
        (None, None, "", "waiting"),
    ]
    assert found[0]["arguments"] == ["--env=mine", "--lora_rank=4"]
    assert found[0]["output_dir"] == "output/mine"
    assert found[0]["added"].endswith("+00:00")


def test_an_entry_is_taken_out(client: TestClient, workspace: Path) -> None:
    entry = Queue.of(workspace).add(["--env=mine"], "output/mine")
    assert client.delete("/api/queue", params={"id": entry.id}, headers=SAME).status_code == 204
    assert client.get("/api/queue").json() == []
    gone = client.delete("/api/queue", params={"id": entry.id}, headers=SAME)
    assert gone.status_code == 422
    assert "there is none" in gone.text


def test_an_entry_is_moved(client: TestClient, workspace: Path) -> None:
    queue = Queue.of(workspace)
    for name in "abc":
        queue.add(["--help"], f"output/{name}")

    def moved(**wanted: object) -> list[int]:
        answer = client.post("/api/queue/move", json=wanted, headers=SAME)
        assert answer.status_code == 200, answer.text
        return [entry["id"] for entry in answer.json()]

    assert moved(id=3, to="top") == [3, 1, 2]
    assert moved(id=3, to="down") == [1, 3, 2]
    assert moved(id=2, to=1) == [2, 1, 3]
    for wrong in ({"id": 9, "to": "up"}, {"id": 1, "to": "away"}, {"id": 1, "to": 0}):
        assert client.post("/api/queue/move", json=wrong, headers=SAME).status_code == 422


def test_devices_are_a_list(client: TestClient, environment: str) -> None:
    body = {"environment": environment, "devices": "0; rm -r ."}
    assert client.post("/api/queue", json=body, headers=SAME).status_code == 422
    assert client.get("/api/queue").json() == []


@pytest.mark.slow
def test_what_is_queued_is_trained(client: TestClient, environment: str) -> None:
    def put() -> int:
        answer = client.post("/api/queue", json={"environment": environment}, headers=SAME)
        assert answer.status_code in (201, 422), answer.text
        return answer.status_code

    assert (put(), put()) == (201, 422)  # two runs cannot have one directory
    deadline = time.monotonic() + 120
    while (entry := client.get("/api/queue").json()[0])["state"] in ("waiting", "running"):
        assert time.monotonic() < deadline, entry
        time.sleep(0.5)
    assert (entry["state"], entry["exit_code"], entry["environment"]) == ("done", 0, environment)
    run = client.get("/api/run", params={"run": entry["output_dir"]}).json()
    assert (run["state"], run["step"], run["environment"]) == ("done", 3, environment)
    assert client.post("/api/queue/resume", headers=SAME).json() == [entry]
