"""Checkpoints over the API."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from simpletuner.runs.checkpoints import MANIFEST, building
from simpletuner.runs.events import EventLog, NoticeEvent
from simpletuner.runs.layout import RunDirectory

SAME = {"Origin": "http://localhost:8001"}


@pytest.fixture
def run(workspace: Path) -> RunDirectory:
    """A run with the checkpoints of steps 5 and 10."""
    run = RunDirectory(workspace / "output" / "a")
    run.create()
    with EventLog(run.events) as log:
        log.emit(NoticeEvent(text="began"))
    for step in (10, 5):
        with building(run.checkpoint(step)) as folder:
            (folder / "weights.safetensors").write_bytes(b"w" * step)
    return run


def listed(client: TestClient) -> list[tuple[int, str]]:
    answer = client.get("/api/run/checkpoints", params={"run": "output/a"})
    assert answer.status_code == 200, answer.text
    return [(one["step"], one["state"]) for one in answer.json()]


def verify(client: TestClient, step: int) -> dict[str, object]:
    answer = client.post("/api/run/checkpoint/verify", json={"run": "output/a", "step": step}, headers=SAME)
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


def test_they_are_listed_with_what_is_known(client: TestClient, run: RunDirectory) -> None:
    (first, _) = client.get("/api/run/checkpoints", params={"run": "output/a"}).json()
    manifest = (run.checkpoint(5) / MANIFEST).stat()
    assert (first["step"], first["path"]) == (5, "output/a/checkpoints/step-000005")
    assert first["bytes"] == 5 + manifest.st_size
    assert first["time"].endswith("+00:00")
    assert listed(client) == [(5, "unverified"), (10, "unverified")]


def test_a_verdict_holds_until_a_file_changes(client: TestClient, run: RunDirectory) -> None:
    assert verify(client, 5)["state"] == "good"
    assert listed(client) == [(5, "good"), (10, "unverified")]
    (run.checkpoint(5) / "weights.safetensors").write_bytes(b"other")
    assert listed(client) == [(5, "unverified"), (10, "unverified")]
    found = verify(client, 5)
    assert (found["state"], found["damage"]) == (
        "damaged",
        "weights.safetensors does not have the hash in its manifest",
    )
    assert listed(client) == [(5, "damaged"), (10, "unverified")]


def test_one_that_is_not_there_is_refused(client: TestClient, run: RunDirectory) -> None:
    for step in (7, 10**12):
        answer = client.post("/api/run/checkpoint/verify", json={"run": "output/a", "step": step}, headers=SAME)
        assert answer.status_code == 404
        answer = client.delete("/api/run/checkpoint", params={"run": "output/a", "step": step}, headers=SAME)
        assert answer.status_code == 404
    assert len(listed(client)) == 2
    assert run.checkpoint(5).is_dir()


def test_a_link_out_of_the_run_is_not_followed(client: TestClient, run: RunDirectory, workspace: Path) -> None:
    away = workspace.parent / "away"
    run.checkpoint(5).rename(away)
    run.checkpoint(5).symlink_to(away)
    answer = client.post("/api/run/checkpoint/verify", json={"run": "output/a", "step": 5}, headers=SAME)
    assert answer.status_code == 403


@pytest.mark.parametrize("confirm", ["", "5", "010", "yes"])
def test_nothing_is_deleted_unconfirmed(client: TestClient, run: RunDirectory, confirm: str) -> None:
    where = {"run": "output/a", "step": 10, "confirm": confirm}
    assert client.delete("/api/run/checkpoint", params=where, headers=SAME).status_code == 422
    assert run.checkpoint(10).is_dir()


def test_one_is_deleted(client: TestClient, run: RunDirectory) -> None:
    where = {"run": "output/a", "step": 5, "confirm": "5"}
    answer = client.delete("/api/run/checkpoint", params=where, headers=SAME)
    assert answer.status_code == 204, answer.text
    assert listed(client) == [(10, "unverified")]
    assert not run.checkpoint(5).exists()
