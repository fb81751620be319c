"""Whole runs of the real flavours from a Hub on this machine, which serves the embedded models under the real ids."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.loopback_hub import LoopbackHub, linked_copy, loopback_hub
from tests.recipes.conftest import Workplace

from simpletuner.base.errors import AccessError, DiskError
from simpletuner.base.signals import STOPPED
from simpletuner.config.flavours import FLAVOURS

SECRET = "hf_thisIsNobodysToken"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
NEEDED = {
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/chat_template.jinja",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    TRANSFORMER,
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


def offered(embedded: Path, folder: Path) -> Path:
    """A repository as Black Forest Labs has them: also files that training does not need, and two shards of the text
    encoder, of which the second holds its last layers alone.
    """
    linked_copy(embedded, folder)
    whole = folder / "text_encoder/model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    late = ("layers.28.", "layers.29.", "layers.30.", "layers.31.", "lm_head", "vision_tower", "model.norm")
    if "mistral" in (folder / "text_encoder/config.json").read_text():
        late = ("layers.30.", "layers.31.", "lm_head", "vision_tower", "multi_modal_projector", "model.norm")
    shards = {name: f"model-0000{1 + any(part in name for part in late)}-of-00002.safetensors" for name in tensors}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, whole.with_name(shard))
    whole.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for extra in ("README.md", "flux2.safetensors", "transformer/diffusion_pytorch_model.fp8.safetensors"):
        (folder / extra).write_bytes(b"what nobody needs")
    return folder


@pytest.fixture
def hub(
    tiny_folder: Path, tiny_klein_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LoopbackHub]:
    embedded = {"dev": tiny_folder, "klein-4b": tiny_klein_folder}
    repositories = {
        str(FLAVOURS[flavour].repo): offered(folder, tmp_path / "hub" / flavour) for flavour, folder in embedded.items()
    }
    with loopback_hub(repositories) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield server


def start(place: Workplace, flavour: str) -> None:
    """Let `place` train two steps of `flavour`."""
    place.config |= {
        "model_flavour": flavour,
        "cache_dir": "hub-cache",
        "max_train_steps": 2,
        "gradient_accumulation_steps": 1,
        "tokenizer_max_length": 64,
        "checkpoint_step_interval": 2,
    }


def tells_no_token(folder: Path) -> bool:
    """Whether no file below `folder` holds the token."""
    return not any(SECRET.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_dev_from_the_hub_is_interrupted_resumed_trained_and_later_trained_without_it(
    hub: LoopbackHub, workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    start(workplace, "dev")
    workplace.write()
    hub.slow = {TRANSFORMER}
    process = subprocess.Popen(
        [sys.executable, "-m", "simpletuner", "train"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    partial = None
    while partial is None and process.poll() is None:
        time.sleep(0.05)
        left = [path for path in Path("hub-cache").rglob("*.incomplete") if path.stat().st_size > 0]
        partial = left[0] if left else None
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - begun < 2
    assert process.returncode == STOPPED, err
    assert partial is not None
    kept = partial.stat().st_size
    assert "Traceback" not in err
    assert SECRET not in out + err

    hub.slow.clear()
    assert workplace.train() == 0
    capsys.readouterr()
    gets = [request for request in hub.requests if request.method == "GET"]
    assert {request.name for request in gets} == NEEDED
    assert [request.first_byte for request in gets if request.name == TRANSFORMER] == [0, kept]
    assert len(gets) == len(NEEDED) + 1
    assert len(hub.requests) - len(gets) <= 2 * (len(NEEDED) + 1)
    assert workplace.run().lora.exists()
    assert tells_no_token(workplace.folder / "output")
    assert tells_no_token(workplace.folder / "cache")
    assert tells_no_token(workplace.folder / "hub-cache")

    hub.shutdown()
    hub.server_close()
    shutil.rmtree(workplace.folder / "output")
    assert workplace.train() == 0
    told = capsys.readouterr()
    assert "Cannot reach the Hub for black-forest-labs/FLUX.2-dev" in told.out + told.err
    assert "using the earlier download" in told.out + told.err


@pytest.mark.slow
def test_klein_from_the_hub_trains_after_each_refusal_was_answered(
    hub: LoopbackHub, workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    start(workplace, "klein-4b")

    def refused(code: int, *words: str) -> None:
        assert workplace.train() == code
        told = "".join(capsys.readouterr())
        assert all(told.count(word) == 1 for word in words), told
        assert "Traceback" not in told
        assert SECRET not in told

    hub.refusal = (403, "GatedRepo")
    refused(AccessError.exit_code, "has no access", "https://huggingface.co/black-forest-labs/FLUX.2-klein-base-4B")
    hub.refusal = None
    hub.size_shown = 10**15
    refused(DiskError.exit_code, "To download from black-forest-labs/FLUX.2-klein-base-4B: ", " free)", "--cache_dir")
    assert not any(name.endswith(".safetensors") for name in hub.downloads())
    hub.size_shown = None
    hub.forget()
    assert workplace.train() == 0
    told = "".join(capsys.readouterr())
    assert "To download from black-forest-labs/FLUX.2-klein-base-4B: " in told
    assert set(hub.downloads()) < NEEDED
    assert TRANSFORMER in hub.downloads()
    assert workplace.run().lora.exists()
    assert tells_no_token(workplace.folder / "output")
