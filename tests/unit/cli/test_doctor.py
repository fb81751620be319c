"""`simpletuner doctor` on machines that lack something. A GPU is what a program named nvidia-smi says."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.loopback_hub import loopback_hub

from simpletuner.base.errors import ConfigError
from simpletuner.base.machine import gpus
from simpletuner.cli.doctor import _disk, _torch, run
from simpletuner.cli.init import run as init
from simpletuner.config.run import RunConfig

TOKEN = "hf_secretsecretsecret"


@pytest.fixture(autouse=True)
def bare(own_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, no token, and an empty Hub cache."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return own_folder


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*names: str, driver: str = "580.65", mib: int = 24564) -> None:
        command = tmp_path / "bin" / "nvidia-smi"
        command.parent.mkdir()
        listed = enumerate(names or ("NVIDIA RTX 4090",))
        rows = "".join(f"echo '{index}, {name}, {driver}, {mib}, 300, 0'\n" for index, name in listed)
        command.write_text(f"#!/bin/sh\n{rows}")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")

    return install


def examined(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = run(["--json", *flags])
    text = capsys.readouterr().out
    assert TOKEN not in text
    found = json.loads(text)
    assert (found["exit_code"], found["ready"]) == (code, code == 0)
    for check in found["checks"]:
        assert (check["remedy"] != "") == (check["state"] != "ok"), check
    return code, {check["name"]: check for check in found["checks"]}


def tiny_project(**changes: object) -> None:
    Path("images").mkdir()
    Image.new("RGB", (128, 128)).save("images/a.png")
    init(["--images=images", "--card=none", "--yes"])
    path = Path("config/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_without_a_configuration_it_says_what_dev_needs(capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = examined(capsys)
    assert code == 4
    assert (checks["config"]["state"], checks["config"]["remedy"]) == ("warning", "simpletuner init")
    assert checks["GPU"]["found"] == "no NVIDIA GPU was found"
    assert checks["GPU"]["exit_code"] == 5
    assert checks["download"]["found"].startswith("needs 92.45 GiB of ")
    assert "hf auth login" in checks["Hub"]["remedy"]


def test_a_configuration_of_the_embedded_model_can_start(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_project()
    capsys.readouterr()
    code, checks = examined(capsys)
    assert code == 0
    assert {check["state"] for check in checks.values()} == {"ok"}
    assert checks["images"]["found"] == "1 in images"
    assert run([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Training can start."
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 160


def test_each_missing_thing_has_its_stages_code(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_project()
    capsys.readouterr()
    Path("images/a.png").unlink()
    code, checks = examined(capsys)
    assert (code, checks["images"]["state"]) == (3, "missing")
    code, checks = examined(capsys, "--lora_rank=0")
    assert (code, checks["config"]["remedy"]) == (2, "simpletuner config check --lora_rank=0")
    assert checks["config"]["found"] == "config/config.json: 1 problem"


def test_torch_for_the_cpu_beside_a_gpu_is_named(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.version.cuda is not None:
        pytest.skip("torch is built for CUDA")
    gpu("NVIDIA RTX 4090", "NVIDIA RTX 4090")
    code, checks = examined(capsys)
    assert code == 2
    assert checks["torch"]["state"] == "missing"
    assert "built for the CPU, although there is a GPU" in checks["torch"]["found"]
    card = checks["GPU"]
    assert (card["state"], card["exit_code"], card["remedy"]) == ("missing", 2, checks["torch"]["remedy"])
    assert card["found"] == "NVIDIA RTX 4090, 23.99 GiB, driver 580.65, which this torch cannot use"
    assert checks["VRAM"]["state"] == "ok", "int8 and streaming, as for a card of 24 GB"
    assert run([]) == 2
    assert capsys.readouterr().out.count(f"GPU: {card['remedy']}\n") == 1, "once for all GPUs"


def test_each_gpu_has_its_own_capability_in_whichever_order_torch_lists_them(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("Tesla T4", "NVIDIA RTX 4090", "NVIDIA RTX 2080")
    listed_by_torch = [("NVIDIA RTX 4090", (8, 9)), ("Tesla T4", (7, 5))]  # the third is not visible
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(listed_by_torch))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: listed_by_torch[index][0])
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: listed_by_torch[index][1])
    cards = [check for check in _torch(RunConfig(mixed_precision="bf16"), gpus()) if check.name == "GPU"]
    assert [(card.state, card.found.partition(",")[0]) for card in cards] == [
        ("warning", "Tesla T4"), ("ok", "NVIDIA RTX 4090"), ("ok", "NVIDIA RTX 2080")
    ]  # fmt: skip
    assert cards[0].found.endswith(", without bf16")


def test_several_gpus_are_told_with_what_plans_for_them(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu("NVIDIA RTX 4090", "NVIDIA RTX 4090")
    _, checks = examined(capsys)
    assert checks["GPUs"]["found"] == "2, of which one trains; simpletuner plan --gpus=2 shows how to train on all"
    tiny_project(num_processes=2)
    capsys.readouterr()
    assert "GPUs" not in examined(capsys)[1]


@pytest.mark.parametrize(("driver", "cuda", "needed"), [("520.1", "12.8", "525"), ("570.0", "13.0", "580")])
def test_a_driver_that_is_too_old_for_torch_is_named(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], driver: str, cuda: str, needed: str
) -> None:
    gpu(driver=driver)
    monkeypatch.setattr("torch.version.cuda", cuda)
    code, checks = examined(capsys)
    assert code == 2
    assert checks["GPU"]["remedy"] == f"Install an NVIDIA driver of {needed} or newer: CUDA {cuda} needs it."


def test_a_card_that_is_too_small_has_the_code_of_memory(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu(mib=8188)
    _, checks = examined(capsys)
    assert checks["VRAM"]["state"] == "ok", "the options of a card of 8 GB"
    tiny_project(model_flavour="dev", base_model_precision="int8-quanto")
    capsys.readouterr()
    _, checks = examined(capsys)
    assert (checks["VRAM"]["state"], checks["VRAM"]["exit_code"]) == ("missing", 5)
    assert checks["VRAM"]["remedy"] == "simpletuner plan"


def test_a_card_on_which_dev_is_streamed_is_offered_klein(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu(mib=12282)
    _, checks = examined(capsys)
    assert "simpletuner init --model klein-4b: " in checks["config"]["remedy"]
    assert "Apache-2.0" in checks["config"]["remedy"]


def test_weights_that_are_open_need_no_token(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_project(model_flavour="klein-4b")
    capsys.readouterr()
    _, checks = examined(capsys)
    assert (checks["Hub"]["state"], checks["Hub"]["found"].partition(";")[0]) == (
        "ok",
        "FLUX.2-klein-base-4B is Apache-2.0: no token is needed",
    )
    tiny = Path("config/config.json")
    tiny.write_text(tiny.read_text().replace("klein-4b", "klein-9b"))
    _, checks = examined(capsys)
    assert "FLUX.2-klein-base-9B" in checks["Hub"]["remedy"]


def test_a_token_is_found_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    _, checks = examined(capsys)
    assert checks["Hub"]["state"] == "ok"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, checks = examined(capsys, "--online")
    assert checks["Hub"]["state"] == "missing"
    assert "cannot reach the Hub" in checks["Hub"]["found"]
    assert code == 4


def test_a_token_without_access_is_noticed_although_the_hub_lists_the_model_for_everyone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hub/vae").mkdir(parents=True)
    (tmp_path / "hub/vae/model.safetensors").write_bytes(b"weights")
    with loopback_hub({"black-forest-labs/FLUX.2-dev": tmp_path / "hub"}) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        _, checks = examined(capsys, "--online")
        assert checks["Hub"]["found"] == f"black-forest-labs/FLUX.2-dev may be read, at {hub.commit[:8]}"
        hub.refusal = (403, "GatedRepo")
        code, checks = examined(capsys, "--online")
    assert (code, checks["Hub"]["state"]) == (4, "missing")
    assert "https://huggingface.co/black-forest-labs/FLUX.2-dev" in checks["Hub"]["remedy"]


def test_klein_4b_needs_no_token(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config").mkdir()
    Path("config/config.json").write_text('{"model_flavour": "klein-4b"}')
    _, checks = examined(capsys)
    assert checks["Hub"]["state"] == "ok"
    assert "FLUX.2-klein-base-4B is Apache-2.0: no token is needed" in checks["Hub"]["found"]


def test_compilers_are_asked_for_where_the_options_need_them(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu()
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    _, checks = examined(capsys)
    assert checks["compiler"]["state"] == "warning"
    assert checks["compiler"]["found"].startswith("no C compiler")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_deepspeed_is_asked_for_where_the_options_need_it(
    said_deepspeed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_project(deepspeed_config="zero2")
    capsys.readouterr()
    _, checks = examined(capsys)
    assert (checks["DeepSpeed"]["state"], checks["DeepSpeed"]["found"]) == ("ok", "deepspeed 0.19.8")
    said_deepspeed("0.19.2")
    code, checks = examined(capsys)
    assert (code, checks["DeepSpeed"]["found"]) == (2, "deepspeed 0.19.2 is installed")
    assert checks["DeepSpeed"]["remedy"] == "pip install -e '.[deepspeed]'"
    assert "DeepSpeed" not in examined(capsys, "--deepspeed_config={}")[1]


def test_a_folder_that_may_not_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o755)
        os.seteuid(65534)
        try:
            output = list(_disk(RunConfig(output_dir=f"{place}/out")))[-1]
        finally:
            os.seteuid(0)
    assert (output.state, output.found, output.exit_code) == ("missing", f"{place} is not writable", 7)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ConfigError, match="--jsn: no such option"):
        run(["--jsn"])
