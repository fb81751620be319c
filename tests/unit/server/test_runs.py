"""Runs over the API: found, told, followed, asked; their files."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from simpletuner.runs.events import (
    CheckpointEvent,
    EndEvent,
    ErrorEvent,
    EventLog,
    PhaseEvent,
    Picture,
    PlanEvent,
    ProgressEvent,
    RunEvent,
    StepEvent,
    ValidationEvent,
)
from simpletuner.runs.layout import RunDirectory
from simpletuner.server import meter

CROSS = {"Origin": "http://localhost:8001"}


def run_event(steps: int = 4) -> RunEvent:
    return RunEvent(program="simpletuner 1", pid=1, resumed_from=None, steps=steps, pictures=6, trainable=100)


def step(number: int, loss: float = 0.5) -> StepEvent:
    return StepEvent(step=number, epoch=0, loss=loss, lr=1e-4, grad_norm=1.0, seconds=0.25, memory_gib=2.5)


def trained(folder: Path, steps: int = 4) -> RunDirectory:
    """A finished run with a picture, a checkpoint and a log."""
    run = RunDirectory(folder)
    run.create()
    run.config.write_text(json.dumps({"model_type": "lora", "lora_rank": 4}))
    run.log.write_text("began\nended ü\n", encoding="utf-8")
    run.validation(2).mkdir(parents=True)
    Image.new("RGB", (64, 32), "red").save(run.validation(2) / "a.png")
    run.lora.write_bytes(b"weights")
    with EventLog(run.events) as log:
        log.emit(PlanEvent(plan={"fits": True}, remedy=None))
        log.emit(run_event(steps))
        log.emit(PhaseEvent(phase="text", state="begin"))
        log.emit(ProgressEvent(phase="text", done=6, total=6, per_s=3.0, eta_s=0.0))
        log.emit(PhaseEvent(phase="text", state="end", seconds=1.5, memory_gib=0.5))
        log.emit(PhaseEvent(phase="train", state="begin"))
        for number in range(1, steps + 1):
            log.emit(step(number, loss=1 / number))
        picture = Picture(name="a", prompt="a flag", path="validation/step-000002/a.png", width=64, height=32, seed=1)
        log.emit(ValidationEvent(step=2, pictures=(picture,), sheet="validation/step-000002/sheet.png"))
        log.emit(ValidationEvent(step=2, loss=0.75))
        log.emit(CheckpointEvent(step=4, state="saved", path="checkpoints/step-000004", bytes=7))
        log.emit(EndEvent(reason="done", exit_code=0, step=steps, seconds=9.0, lora=run.lora.name))
    return run


def get(client: TestClient, path: str, **parameters: Any) -> Any:
    answer = client.get(f"/api/{path}", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(answer: Any) -> tuple[int, str]:
    (problem,) = answer.json()["problems"]
    return answer.status_code, problem["text"]


def test_no_runs_is_an_empty_list(client: TestClient) -> None:
    assert get(client, "runs") == []


def test_the_list_has_what_lies_below_output_and_what_environments_name(
    client: TestClient, workspace: Path, environment: str
) -> None:
    trained(workspace / "output" / "mine")
    trained(workspace / "output" / "deep" / "er")
    trained(workspace / "elsewhere")
    other = workspace / "config" / "other"
    other.mkdir()
    (other / "config.json").write_text('{"--output_dir": "elsewhere"}')
    found = {run["run"]: run for run in get(client, "runs")}
    assert set(found) == {"output/mine", "output/deep/er", "elsewhere"}
    assert (found["output/mine"]["environment"], found["elsewhere"]["environment"]) == (environment, "other")
    assert found["output/deep/er"]["environment"] is None
    started = [run["started"] for run in get(client, "runs")]
    assert started == sorted(started, reverse=True)


def test_a_run_is_told(client: TestClient, workspace: Path) -> None:
    trained(workspace / "output" / "a")
    told = get(client, "run", run="output/a")
    assert (told["name"], told["state"], told["step"], told["steps"], told["loss"]) == ("a", "done", 4, 4, 0.25)
    assert (told["lora"], told["error"], told["attempts"]) == ("pytorch_lora_weights.safetensors", None, 1)
    assert told["config"] == {"model_type": "lora", "lora_rank": 4}
    assert told["datasets"] is None
    assert told["plan"] == {"fits": True}
    assert [(phase["phase"], phase["state"]) for phase in told["phases"]] == [("text", "end"), ("train", "begin")]
    assert told["phases"][0]["progress"]["done"] == 6
    assert [event["loss"] for event in told["validations"]] == [None, 0.75]
    assert told["validations"][0]["pictures"][0]["path"] == "validation/step-000002/a.png"
    assert (told["checkpoints"][0]["state"], told["last_id"]) == ("saved", 14)
    series = get(client, "run/series", run="output/a")
    assert (series["step"], series["loss"]) == ([1, 2, 3, 4], [1.0, 0.5, 1 / 3, 0.25])
    assert series["held_out"] == {"step": [2], "loss": [0.75], "ema_loss": [None]}


def test_a_run_that_is_held_is_running_and_obeys(client: TestClient, workspace: Path) -> None:
    run = RunDirectory(workspace / "output" / "a")
    run.create()
    assert get(client, "run", run="output/a")["state"] == "waiting"
    with run.lock():
        with EventLog(run.events) as log:
            log.emit(run_event())
            log.emit(PhaseEvent(phase="train", state="begin"))
            log.emit(step(1))
        told = get(client, "run", run="output/a")
        assert (told["state"], told["phase"], told["pid"]) == ("running", "train", os.getpid())
        for wish in ("save", "validate", "stop"):
            answer = client.post(f"/api/run/{wish}", json={"run": "output/a"}, headers=CROSS)
            assert (answer.status_code, answer.json()["state"]) == (200, "running")
            assert (run.control / wish).exists()
    assert get(client, "run", run="output/a")["state"] == "killed"
    status, text = refusal(client.post("/api/run/stop", json={"run": "output/a"}, headers=CROSS))
    assert status == 422
    assert "no process trains here" in text


def test_events_are_streamed_until_the_server_ends(client: TestClient, workspace: Path) -> None:
    run = trained(workspace / "output" / "a")
    assert client.portal is not None
    portal, streams = client.portal, client.app.state.context.streams  # type: ignore[attr-defined]
    with ThreadPoolExecutor() as pool:
        asked: list[tuple[int, dict[str, str]]] = [(11, {}), (0, {"Last-Event-ID": "12"})]
        answers = [
            pool.submit(client.get, "/api/run/events", params={"run": "output/a", "after": after}, headers=headers)
            for after, headers in asked
        ]
        time.sleep(0.5)
        with EventLog(run.events) as log:
            log.emit(run_event())
        time.sleep(1.2)
        portal.call(streams.close)
        first, second = (answer.result(timeout=10) for answer in answers)
    assert first.headers["content-type"].startswith("text/event-stream")
    assert first.headers["cache-control"] == "no-store"
    lines = run.events.read_text().splitlines()
    assert "".join(f"id: {number}\ndata: {lines[number - 1]}\n\n" for number in (12, 13, 14)) in first.text
    assert f"id: 15\ndata: {lines[14]}\n\n" in first.text
    assert [line for line in second.text.splitlines() if line.startswith("id:")] == ["id: 13", "id: 14", "id: 15"]


def test_an_error_is_told(client: TestClient, workspace: Path) -> None:
    run = RunDirectory(workspace / "output" / "a")
    run.create()
    with EventLog(run.events) as log:
        log.emit(run_event())
        log.emit(step(1, loss=float("nan")))
        log.emit(ErrorEvent(exit_code=3, text="loss = nan: expected a number."))
        log.emit(EndEvent(reason="error", exit_code=3, step=1, seconds=1.0))
    told = get(client, "run", run="output/a")
    assert (told["state"], told["error"], told["loss"]) == ("failed", "loss = nan: expected a number.", None)
    assert get(client, "run/series", run="output/a")["loss"] == [None]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"[]\n",
        b'{"id": 1, "attempt": 1, "time": 5, "type": "step"}\n',
        b'{"id": 1, "attempt": 1, "time": "", "type": "end", "reason": "bored"}\n',
        b'{"id": 1, "attempt": 1, "time": "", "type": "error", "text": "\\ud800"}\n',
        b'{"id": 1e999, "attempt": [], "time": {}, "type": 1}\n',
    ],
)
def test_damaged_events_are_no_fault_of_the_server(client: TestClient, workspace: Path, content: bytes) -> None:
    run = RunDirectory(workspace / "output" / "a")
    run.create()
    run.events.write_bytes(content)
    run.config.write_bytes(b'{"a": NaN, "b": "\\ud800"}')
    assert [one["run"] for one in get(client, "runs")] == ["output/a"]
    assert get(client, "run", run="output/a")["config"] is None
    get(client, "run/series", run="output/a")


def test_the_log_comes_in_parts(client: TestClient, workspace: Path) -> None:
    run = trained(workspace / "output" / "a")
    first = get(client, "run/log", run="output/a")
    assert first == {"text": "began\nended ü\n", "size": 15, "console": None}
    with run.log.open("ab") as file:
        file.write("more ü".encode()[:-1])
    part = get(client, "run/log", run="output/a", after=15)
    assert (part["text"], part["size"]) == ("more ", 20)
    with run.log.open("ab") as file:
        file.write("ü".encode()[1:] + b"\n")
    assert get(client, "run/log", run="output/a", after=20)["text"] == "ü\n"
    assert get(client, "run/log", run="output/a", after=10**6)["text"].startswith("began")
    run.log.write_text("".join(f"line {number}\n" for number in range(20_000)))
    run.console.write_text("from the shell")
    last = get(client, "run/log", run="output/a")
    assert last["text"].startswith("line ")
    assert len(last["text"]) <= 64 * 1024
    assert last["text"].endswith("line 19999\n")
    assert last["console"] == "from the shell"


def test_files_of_a_run(client: TestClient, workspace: Path) -> None:
    run = trained(workspace / "output" / "a")
    where = {"run": "output/a", "path": "validation/step-000002/a.png"}
    picture = client.get("/api/run/file", params=where)
    assert picture.headers["content-type"] == "image/png"
    assert picture.headers["content-disposition"].startswith("inline")
    assert picture.content == (run.validation(2) / "a.png").read_bytes()
    again = client.get("/api/run/file", params=where, headers={"If-None-Match": picture.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    small = client.get("/api/run/file", params=where | {"width": 16})
    assert (small.headers["content-type"], small.content[:3]) == ("image/jpeg", b"\xff\xd8\xff")
    assert small.headers["etag"] != picture.headers["etag"]
    lora = client.get("/api/run/file", params={"run": "output/a", "path": run.lora.name})
    assert lora.headers["content-disposition"] == 'attachment; filename="a-pytorch_lora_weights.safetensors"'
    assert lora.content == b"weights"
    # What it is decides, not what it is called.
    (run.root / "page.png").write_text("<html><script>alert(1)</script>")
    disguised = client.get("/api/run/file", params={"run": "output/a", "path": "page.png"})
    assert disguised.headers["content-type"] == "application/octet-stream"
    assert disguised.headers["content-disposition"].startswith("attachment")
    status, _ = refusal(client.get("/api/run/file", params={"run": "output/a", "path": "page.png", "width": 64}))
    assert status == 422


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../../secret.txt", 403),
        ("../b/run.log", 403),
        ("validation/../../../secret.txt", 403),
        ("/etc/passwd", 403),
        ("link", 403),
        ("folder/secret.txt", 403),
        ("pipe", 404),
        ("validation", 404),
        ("", 404),
        ("nothing", 404),
        ("a\0b", 422),
        ("x" * 5000, 422),
        ("x" * 300, 422),
    ],
)
def test_no_file_outside_a_run_is_given(client: TestClient, workspace: Path, path: str, status: int) -> None:
    run = trained(workspace / "output" / "a")
    trained(workspace / "output" / "b")
    (workspace / "secret.txt").write_text("secret")
    (run.root / "link").symlink_to(workspace / "secret.txt")
    (run.root / "folder").symlink_to(workspace)
    os.mkfifo(run.root / "pipe")
    answer = client.get("/api/run/file", params={"run": "output/a", "path": path})
    assert refusal(answer)[0] == status
    assert "secret\n" not in answer.text


@pytest.mark.parametrize("route", ["run", "run/series", "run/events", "run/log", "run/checkpoints", "run/samples"])
@pytest.mark.parametrize("run", ["..", "/etc", "output/../..", "outside", "~root", "a\0b"])
def test_no_run_outside_the_roots_is_seen(client: TestClient, workspace: Path, route: str, run: str) -> None:
    trained(workspace.parent / "other")
    (workspace / "outside").symlink_to(workspace.parent / "other")
    assert client.get(f"/api/{route}", params={"run": run}).status_code in (403, 404, 422)
    assert get(client, "runs") == []


def test_events_outside_the_run_are_not_read(client: TestClient, workspace: Path) -> None:
    other = trained(workspace.parent / "other")
    run = RunDirectory(workspace / "output" / "a")
    run.create()
    run.events.symlink_to(other.events)
    run.log.symlink_to(other.log)
    for route in ("run", "run/series", "run/events", "run/log"):
        assert client.get(f"/api/{route}", params={"run": "output/a"}).status_code == 403


def test_a_folder_without_a_run_is_none(client: TestClient, environment: str) -> None:
    status, _ = refusal(client.get("/api/run", params={"run": f"config/{environment}"}))
    assert status == 404


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "does not say what to train"),
        ({"environment": "mine", "example": "tiny-lora"}, "does not say what to train"),
        ({"environment": "yours"}, "there is no environment yours"),
        ({"environment": "../mine"}, ""),
        ({"example": "--config"}, ""),
        ({"environment": "mine", "options": {"lora_rnak": 4}}, "Did you mean lora_rank?"),
        ({"environment": "mine", "options": {"env": "other"}}, "no such option"),
        ({"environment": "mine", "options": {"json": "x"}}, "no such option"),
        ({"environment": "mine", "options": {"LORA": 1}}, ""),
        ({"environment": "mine", "options": {"lora_rank": [1]}}, ""),
        ({"environment": "mine", "options": {"caption_dropout_probability": "a\0b"}}, "cannot be passed to a command"),
        ({"environment": "mine", "options": {"output_dir": "../away"}}, "outside the folders"),
        ({"environment": "mine", "options": {"output_dir": "/tmp/away"}}, "outside the folders"),
        ({"environment": "mine", "more": 1}, ""),
    ],
)
@pytest.mark.parametrize("route", ["run/start", "queue"])
def test_what_cannot_be_started_is_refused(
    client: TestClient, environment: str, route: str, body: dict[str, Any], text: str
) -> None:
    assert environment == "mine"
    answer = client.post(f"/api/{route}", json=body, headers=CROSS)
    assert answer.status_code in (403, 404, 422)
    assert text in " ".join(problem["text"] for problem in answer.json()["problems"])


def test_the_words_of_the_shell_come_back(client: TestClient, environment: str) -> None:
    body = {"environment": environment, "options": {"lora_rank": -1}}
    status, text = refusal(client.post("/api/run/start", json=body, headers=CROSS))
    assert status == 422
    assert "lora_rank" in text
    assert "above 0" in text or "at least 1" in text


def test_a_start_is_answered_with_a_run_that_is_starting(client: TestClient, environment: str, workspace: Path) -> None:
    """And twice the same start is one; another one in the same folder is refused."""
    body = {"environment": environment, "options": {"model_flavour": "dev", "cache_dir": "nowhere"}}
    first = client.post("/api/run/start", json=body, headers=CROSS)
    again = client.post("/api/run/start", json=body, headers=CROSS)
    run = RunDirectory(workspace / "output" / "mine")
    try:
        assert (first.status_code, first.json()["state"], first.json()["run"]) == (200, "starting", "output/mine")
        assert (again.status_code, again.json()["pid"]) == (200, first.json()["pid"])
        other = client.post("/api/run/start", json=body | {"options": {"lora_rank": 2}}, headers=CROSS)
        status, text = refusal(other)
        assert (status, "is in use by process" in text) == (422, True)
        assert get(client, "runs")[0]["state"] == "starting"
        assert get(client, "run", run="output/mine")["attempts"] == 0
    finally:
        os.kill(first.json()["pid"], signal.SIGKILL)
    while run.starting_lock().is_held():
        time.sleep(0.02)
    (told,) = get(client, "runs")
    assert told["state"] == "failed"
    assert "printed nothing" in told["error"]


def test_the_list_is_read_again_only_where_a_run_changed(client: TestClient, workspace: Path) -> None:
    one, two = (trained(workspace / "output" / name) for name in "ab")
    first = client.get("/api/runs")
    same = client.get("/api/runs", headers={"If-None-Match": first.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    run_list = client.app.state.context.run_list  # type: ignore[attr-defined]
    before = {run: known.json for run, known in run_list._cache.items()}
    with one.lock():
        told = client.get("/api/runs", headers={"If-None-Match": first.headers["etag"]})
        assert [run["state"] for run in told.json() if run["run"] == "output/a"] == ["running"]
    client.get("/api/runs")
    assert run_list._cache[two].json is before[two]
    two.note.write_text("mine")
    assert {run["run"]: run["note"] for run in get(client, "runs")} == {"output/a": "", "output/b": "mine"}


def test_201_idle_runs_cost_little_of_the_processor(client: TestClient, workspace: Path) -> None:
    """0.008 s a poll where it was measured (0.114 s before it was cached): ten times that is the bound."""
    for number in range(201):
        run = RunDirectory(workspace / "output" / str(number))
        run.root.mkdir(parents=True)
        run.events.write_text('{"v": 1, "id": 1, "time": "2026-01-01", "attempt": 1, "type": "notice", "text": ""}\n')
    get(client, "runs")
    began = time.process_time()
    for _ in range(5):
        get(client, "runs")
    assert (time.process_time() - began) / 5 < 0.08


def test_a_note_is_written_and_another_one_is_not_lost(client: TestClient, workspace: Path) -> None:
    trained(workspace / "output" / "a")
    body = {"run": "output/a", "text": "mine", "seen": ""}
    answer = client.put("/api/run/note", json=body, headers=CROSS)
    assert (answer.status_code, answer.json()["note"]) == (200, "mine")
    status, text = refusal(client.put("/api/run/note", json=body | {"text": "theirs"}, headers=CROSS))
    assert (status, "was changed meanwhile, to: mine" in text) == (409, True)
    assert get(client, "run", run="output/a")["note"] == "mine"


def test_a_run_is_deleted_with_what_is_in_it(client: TestClient, workspace: Path) -> None:
    run = trained(workspace / "output" / "a")
    assert get(client, "run/contents", run="output/a")["text"] == "the finished result, 1 image, 5 files in all"
    with run.lock():
        status, text = refusal(client.delete("/api/run", params={"run": "output/a"}, headers=CROSS))
        assert (status, "is in use by process" in text) == (422, True)
    assert client.delete("/api/run", params={"run": "output/a"}, headers=CROSS).status_code == 204
    assert not run.root.exists()
    assert client.get("/api/run", params={"run": "output/a"}).status_code == 404
    for folder in ("output", ".", "config"):
        assert client.delete("/api/run", params={"run": folder}, headers=CROSS).status_code == 404


def test_a_killed_deletion_is_finished_by_the_first_list(client: TestClient, workspace: Path) -> None:
    half = trained(workspace / "output" / ".a.0123abcd.deleted")
    assert get(client, "runs") == []
    assert not half.root.exists()


def test_the_machine_is_told(
    client: TestClient, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '0, NVIDIA GeForce RTX 4090, 570.86.15, 24564, 18123, 97'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(meter, "MAX_AGE_S", 3600.0)
    monkeypatch.setattr(meter, "LOW_DISK_BYTES", 2**60)
    told = get(client, "machine")
    assert told["disk_free_bytes"] > 0
    assert told["disk_is_low"] is True
    assert 0 < told["ram_available_bytes"] <= told["ram_total_bytes"]
    (gpu,) = told["gpus"]
    assert (gpu["name"], gpu["utilization_percent"], gpu["used_bytes"]) == (
        "NVIDIA GeForce RTX 4090",
        97,
        18123 * 2**20,
    )
    # Asked of the system once a while, however many look.
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    assert get(client, "machine") == told
    assert not (workspace / "output").exists()
