"""Weight files over the API: inspected where they lie and as they are sent, converted and merged for download."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load, load_file
from tests.lora_dialects import write_dialect

from simpletuner.config.flavours import TINY
from simpletuner.config.options.lora import LoraFormat
from simpletuner.server.api import weights
from simpletuner.server.api.weights import SCRATCH

RAW = {"Content-Type": "application/octet-stream"}
RUN = "output/mine"
LORA = f"{RUN}/pytorch_lora_weights.safetensors"


@pytest.fixture
def lora(workspace: Path) -> Path:
    """The finished LoRA of a run."""
    path = workspace / LORA
    path.parent.mkdir(parents=True)
    (path.parent / "events.jsonl").write_text("")
    write_dialect(path, TINY, "1 diffusers", blocks_only=True)
    return path


def left(workspace: Path) -> list[Path]:
    """What requests left behind."""
    return list((workspace / SCRATCH).iterdir()) if (workspace / SCRATCH).exists() else []


def found_of(answer: Any) -> str:
    assert answer.status_code == 422, answer.text
    (problem,) = answer.json()["problems"]
    return str(problem["found"])


@pytest.mark.slow
def test_a_file_says_the_same_where_it_lies_and_as_it_is_sent(client: TestClient, workspace: Path, lora: Path) -> None:
    here = client.get("/api/inspect", params={"path": LORA})
    sent = client.put("/api/inspect", params={"name": "theirs.safetensors"}, content=lora.read_bytes(), headers=RAW)
    assert (here.status_code, sent.status_code) == (200, 200), sent.text
    assert (here.json()["path"], sent.json()["path"]) == (LORA, "theirs.safetensors")
    (one,), (other,) = here.json()["files"], sent.json()["files"]
    assert one["adapter"] == other["adapter"]
    assert one["what"] == "LoRA for FLUX.2 tiny"
    for name in ("a.safetensors", "A.SAFETENSORS"):
        damaged = client.put("/api/inspect", params={"name": name}, content=b"x", headers=RAW)
        assert found_of(damaged).startswith(f"{name} is 1 bytes long")  # and no folder of the server
    assert left(workspace) == []


def test_what_is_sent_is_refused_by_name_and_size(
    client: TestClient, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "LARGEST_INSPECTED", 10)
    killed = workspace / SCRATCH / ".0123456789abcdef.1.part"  # what a killed server left
    killed.mkdir(parents=True)
    (killed / "theirs.safetensors").write_bytes(b"x")
    rules = client.get("/api/inspect/rules").json()
    assert rules == {"suffixes": [".safetensors", ".gguf"], "largest": 10}
    for name, data in (("a.ckpt", b"x"), ("../a.safetensors", b"x"), (".a.gguf", b"x"), ("a.gguf", b"x" * 11)):
        answer = client.put("/api/inspect", params={"name": name}, content=data, headers=RAW)
        assert "is refused" in found_of(answer)
    assert left(workspace) == []


@pytest.mark.slow
def test_a_lora_is_downloaded_in_another_format(client: TestClient, workspace: Path, lora: Path) -> None:
    for path in (LORA, RUN):
        answer = client.post("/api/lora/convert", json={"path": path, "format": "comfyui"})
        assert answer.status_code == 200, answer.text
        assert 'filename="mine-comfyui.safetensors"' in answer.headers["content-disposition"]
        names = load(answer.content)
        assert all(name.startswith("diffusion_model.") for name in names)
    write_dialect(lora, TINY, "1 diffusers")
    answer = client.post("/api/lora/convert", json={"path": LORA, "format": "kohya"})
    assert "--allow-loss" in found_of(answer)
    assert str(workspace) not in answer.text
    answer = client.post("/api/lora/convert", json={"path": LORA, "format": "kohya", "allow_loss": True})
    assert answer.status_code == 200, answer.text
    assert left(workspace) == []


@pytest.mark.slow
def test_loras_are_merged_with_their_strengths(client: TestClient, workspace: Path, lora: Path) -> None:
    loras = [{"path": LORA, "strength": 0.5}, {"path": RUN, "strength": -0.25}]
    answer = client.post("/api/lora/merge", json={"loras": loras, "rank": 4})
    assert answer.status_code == 200, answer.text
    merged, single = load(answer.content), load_file(lora)
    assert merged.keys() == single.keys()
    for name in single:
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            delta = single[other].double() @ single[name].double() * 0.25
            assert (merged[other].double() @ merged[name].double() - delta).norm() <= 1e-5 * delta.norm()
    assert left(workspace) == []


@pytest.mark.slow
def test_a_merged_lora_comes_with_what_was_lost(client: TestClient, workspace: Path, lora: Path) -> None:
    unread = {"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 8)}
    write_dialect(lora, TINY, "1 diffusers", also=unread)
    answer = client.post("/api/lora/merge", json={"loras": [{"path": LORA}, {"path": RUN}], "rank": 1})
    assert answer.status_code == 200, answer.text
    written, *others = json.loads(answer.headers["x-said"])
    assert written.startswith("LoRA: merged-diffusers.safetensors (")
    assert " layers of rank 1, with at least " in written
    assert any(line.startswith("ComfyUI does not apply ") for line in others)
    assert f"{LORA}: 1 keys for the text encoder are left out: FLUX.2's text encoder is never trained." in others
    assert str(workspace) not in answer.headers["x-said"]


def test_what_is_no_lora_is_refused_before_a_command_starts(client: TestClient, workspace: Path) -> None:
    (workspace / "a.txt").write_text("x")
    for path in ("a.txt", "none.safetensors", "."):
        for route, body in (
            ("lora/convert", {"path": path, "format": "kohya"}),
            ("lora/merge", {"loras": [{"path": path}, {"path": path}]}),
        ):
            assert "there is no LoRA" in found_of(client.post(f"/api/{route}", json=body))
        assert "there is no weight file" in found_of(client.get("/api/inspect", params={"path": path}))
    assert not (workspace / SCRATCH).exists()


def test_the_page_offers_every_format() -> None:
    script = Path(weights.__file__).parents[1] / "page" / "loraformats.js"
    line = next(line for line in script.read_text().splitlines() if line.startswith("const FORMATS"))
    assert all(f"{name}:" in line for name in get_args(LoraFormat))
