"""Trying a LoRA: what may be asked for, how it reaches the shell, what was drawn before. And all of it for once."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image, PngImagePlugin

from simpletuner.runs.events import EventLog, NoticeEvent
from simpletuner.runs.layout import LORA_NAME, RunDirectory
from simpletuner.runs.queue import Queue
from simpletuner.server.api.samples import SampleJobRequest, WeightedLora, sample_request
from simpletuner.server.context import ServerContext
from simpletuner.server.faults import Fault
from simpletuner.server.roots import Roots
from simpletuner.server.sampler import SamplerProcess, run_on_sampler_gpu
from simpletuner.server.shell import Shell
from simpletuner.server.work import Jobs

SAME = {"Origin": "http://localhost:8001"}


@pytest.fixture
def run(workspace: Path) -> RunDirectory:
    run = RunDirectory(workspace / "output" / "a")
    run.create()
    with EventLog(run.events) as log:
        log.emit(NoticeEvent(text="began"))
    return run


@pytest.fixture
def here(workspace: Path) -> ServerContext:
    shell = Shell(workspace)
    return ServerContext(Roots(workspace), shell, Jobs(shell), SamplerProcess(shell))


def test_a_wish_becomes_a_request_of_the_sampler(here: ServerContext, run: RunDirectory) -> None:
    run.checkpoint(5).mkdir(parents=True)
    (run.checkpoint(5) / LORA_NAME).write_bytes(b"")
    run.lora.write_bytes(b"")
    wanted = SampleJobRequest(
        run="output/a",
        prompts=["a flag", "--out=/etc; $(reboot)\nü"],
        seed=7,
        width=128,
        height=256,
        steps=4,
        count=2,
        loras=[
            WeightedLora(path="output/a/checkpoints/step-000005", strength=0.8),
            WeightedLora(path=f"output/a/{LORA_NAME}", strength=-1),
        ],
        strengths=[0, 0.5],
    )
    assert sample_request(here, wanted) == {
        "run": "output/a",
        "out": "output/a/samples",
        "prompt": ["a flag", "--out=/etc; $(reboot)\nü"],
        "strength": [0, 0.5],
        "lora": ["output/a/checkpoints/step-000005/pytorch_lora_weights.safetensors:0.8", f"output/a/{LORA_NAME}:-1.0"],
        "seed": 7,
        "width": 128,
        "height": 256,
        "steps": 4,
        "num": 2,
    }
    Image.new("RGB", (64, 64)).save(here.workspace / "a.png")
    body = SampleJobRequest(prompts=["x"], references=["a.png", "a.png"])
    assert sample_request(here, body)["references"] == ["a.png"] * 2
    for path, status in (("gone.png", 422), (f"output/a/{LORA_NAME}", 422), ("../a.png", 403)):
        with pytest.raises(Fault) as refused:
            sample_request(here, SampleJobRequest(prompts=["x"], references=[path]))
        assert refused.value.status == status
    plain = sample_request(here, SampleJobRequest(prompts=["x"]))
    assert (plain["out"], plain["prompt"]) == ("samples", ["x"])
    assert not {"run", "lora", "steps", "guidance"} & set(plain), "null is left to the run and the model"
    assert sample_request(here, SampleJobRequest(prompts=["x"], loras=[]))["lora"] == [], "an empty list is the base"


def test_drawing_is_refused_while_a_run_trains_on_the_same_gpu(
    client: TestClient, workspace: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    roots = Roots(workspace)
    assert run_on_sampler_gpu(roots) is None
    with run.lock():
        assert run_on_sampler_gpu(roots) == "output/a"
        answer = client.post("/api/jobs/sample", json={"prompts": ["x"]}, headers=SAME)
        assert answer.status_code == 409
        assert "output/a is training" in answer.json()["problems"][0]["found"]
        queue = Queue.of(workspace)
        entry = queue.add(["--env=mine"], "output/b", "1")
        for devices, is_in_the_way in (("1", False), ("0,1", True), ("", True), ("GPU-5c89f7", True)):
            changed = {"state": "running", "output_dir": "output/a", "devices": devices, "pid": os.getpid()}
            with queue.process_lock(entry.id):
                queue.write(entry.model_copy(update=changed))
                assert (run_on_sampler_gpu(roots) is not None) == is_in_the_way, devices


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../away.safetensors", 403),
        ("/etc/passwd", 403),
        ("link.safetensors", 403),
        ("folder", 403),
        ("config.json", 422),
        ("missing.safetensors", 422),
        ("empty", 422),
        ("", 422),
    ],
)
def test_only_loras_below_the_roots_act(here: ServerContext, workspace: Path, path: str, status: int) -> None:
    (workspace.parent / "away.safetensors").write_bytes(b"")
    (workspace / "link.safetensors").symlink_to(workspace.parent / "away.safetensors")
    (workspace / "config.json").write_text("{}")
    (workspace / "empty").mkdir()
    (workspace / "folder").mkdir()
    (workspace / "folder" / LORA_NAME).symlink_to(workspace.parent / "away.safetensors")
    with pytest.raises(Fault) as refused:
        sample_request(here, SampleJobRequest(prompts=["x"], loras=[WeightedLora(path=path)]))
    assert refused.value.status == status


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": []},
        {"prompts": ["x"] * 9},
        {"prompts": [""]},
        {"prompts": ["a\0b"]},
        {"prompts": ["x" * 4001]},
        {"strengths": [11]},
        {"strengths": [0] * 13},
        {"strengths": ["strong"]},
        {"width": 100},
        {"height": 4096},
        {"count": 17},
        {"count": 0},
        {"seed": -1},
        {"steps": 0},
        {"guidance": -1},
        {"loras": [{"path": "a", "strength": "strong"}]},
        {"out": "/tmp"},
        {"run": "nowhere"},
    ],
)
def test_what_cannot_be_drawn_is_refused(client: TestClient, change: dict[str, Any]) -> None:
    answer = client.post("/api/jobs/sample", json={"prompts": ["x"]} | change, headers=SAME)
    assert answer.status_code in (404, 422)
    assert answer.json()["problems"]


def test_pictures_drawn_before_tell_what_they_are_of(client: TestClient, run: RunDirectory) -> None:
    folder = run.root / "samples"
    folder.mkdir()
    for name, parameters in (
        ("told", json.dumps({"prompt": "a flag", "seed": 7, "steps": 4, "guidance": 1.0, "loras": [{"name": "a"}]})),
        ("foreign", "Steps: 20, Sampler: Euler"),
        ("odd", json.dumps({"prompt": 5, "seed": "x"})),
    ):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", parameters)
        Image.new("RGB", (32, 16)).save(folder / f"{name}.png", pnginfo=info)
    (folder / "none.png").write_text("no picture")
    (folder / "torn.png").write_bytes((folder / "told.png").read_bytes()[:20])
    answer = client.get("/api/run/samples", params={"run": "output/a"})
    assert answer.status_code == 200, answer.text
    found = {Path(one["path"]).stem: one for one in answer.json()}
    assert set(found) == {"told", "foreign", "odd"}
    told = found["told"]
    assert (told["path"], told["prompt"], told["seed"]) == ("output/a/samples/told.png", "a flag", 7)
    assert (told["width"], told["height"], told["loras"]) == (32, 16, [{"name": "a"}])
    assert found["foreign"]["prompt"] is found["odd"]["prompt"] is None


def wait_for(found: Callable[[], Any], seconds: float = 120) -> Any:
    """What `found` gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.2)
    return value


@pytest.mark.slow
def test_train_look_and_draw(client: TestClient, environment: str) -> None:
    """One run through all routes: started, followed to its end, its checkpoint verified, its LoRA tried."""

    def get(path: str, **parameters: Any) -> Any:
        answer = client.get(f"/api/{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    started = client.post("/api/run/start", json={"environment": environment}, headers=SAME)
    assert started.status_code == 200, started.text
    run = started.json()["run"]
    assert (run, started.json()["environment"]) == ("output/mine", environment)
    told = wait_for(lambda: (found := get("run", run=run))["state"] == "done" and found)
    assert (told["step"], told["lora"]) == (3, LORA_NAME)
    assert get("run/series", run=run)["step"] == [1, 2, 3]
    assert [one["run"] for one in get("runs")] == [run]
    assert get("run/log", run=run)["text"]
    steps = [one["step"] for one in get("run/checkpoints", run=run)]
    if steps:
        verified = client.post("/api/run/checkpoint/verify", json={"run": run, "step": steps[-1]}, headers=SAME)
        assert verified.json()["state"] == "good"
    wanted = {"run": run, "prompts": ["a flag"], "width": 64, "height": 64, "steps": 1, "count": 2}
    job = client.post("/api/jobs/sample", json=wanted, headers=SAME).json()
    done = wait_for(lambda: (found := get(f"jobs/{job['id']}"))["state"] != "running" and found)
    assert done["state"] == "done", done
    assert done["progress"] == {"what": "generating", "done": 2, "total": 2}
    pictures = done["result"]["pictures"]
    assert len(pictures) == 2
    assert pictures[0].startswith("output/mine/samples/")
    assert client.get("/api/picture", params={"path": pictures[0]}).headers["content-type"] == "image/png"
    assert {one["path"] for one in get("run/samples", run=run)} == set(pictures)
    assert get("run/samples", run=run)[0]["prompt"] == "a flag"
    again = client.post("/api/run/start", json={"environment": environment}, headers=SAME)
    assert (again.status_code, again.json()["state"]) == (200, "starting")
    assert wait_for(lambda: get("run", run=run)["state"] == "done")
