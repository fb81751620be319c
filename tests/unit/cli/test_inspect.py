"""`simpletuner inspect`: what it prints, for people and as JSON."""

import json
from pathlib import Path

import pytest
from tests.lora_dialects import MIXTURE, write_dialect

from simpletuner.base.errors import AccessError, ConfigError
from simpletuner.cli.inspect import run
from simpletuner.config.flavours import TINY


def test_a_lora_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    header = {"ss_network_module": "networks.lora_flux_2", "ss_steps": "900", "ss_base_model_version": "flux2"}
    write_dialect(path, TINY, "4 musubi-tuner", ranks=(4, 8), header=header)
    assert run([str(path)]) == 0
    text = capsys.readouterr().out
    for part in (
        "LoRA for FLUX.2 tiny",
        "dev, according to its header",
        "kohya; F32",
        "47 layers (custom)",
        "loads all of it",
        "leaves out 6 of 47: ",
        "transformer_blocks.*.attn.to_q",
        "single_transformer_blocks.5",
        "a trainer of kohya's family",
        "900",
    ):
        assert part in text
    assert run([str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(path)
    (report,) = told["files"]
    assert report["adapter"]["modules"] == 47
    assert report["header"] == header


def test_names_from_a_file_cannot_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"\x1b[2Jevil": torch.ones(1)}, tmp_path / "a.safetensors")
    run([str(tmp_path / "a.safetensors")])
    also = {"\x1b[2Jother": torch.ones(1)}
    write_dialect(tmp_path / "b.safetensors", TINY, "1 diffusers", blocks_only=True, also=also)
    run([str(tmp_path / "b.safetensors")])
    text = capsys.readouterr().out
    assert "evil" in text
    assert "1 keys (unknown)" in text
    assert "\x1b" not in text


def test_a_folder_is_described_file_by_file(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(tiny_folder)]) == 0
    text = capsys.readouterr().out
    for what in ("transformer of FLUX.2 tiny", "VAE of FLUX.2 tiny", "text encoder of FLUX.2 tiny"):
        assert what in text


def test_mistakes_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file is named"):
        run([])
    with pytest.raises(AccessError, match="nothing"):
        run([str(tmp_path / "nothing")])
    with pytest.raises(AccessError, match="cannot read ~no-such-user/a"):
        run(["~no-such-user/a.safetensors"])


def test_what_a_loader_makes_of_a_mixture_is_not_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dialect(tmp_path / "a.safetensors", TINY, *MIXTURE)
    run([str(tmp_path / "a.safetensors")])
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "unknown: the prefixes of some keys" in told["diffusers"]
    assert "loads" not in told["diffusers"]
    assert "leaves out " in told["ComfyUI"]
    assert "mixed: bfl, comfyui, diffusers; F32" in told["layout"]


def test_a_folder_with_a_damaged_file_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"cut")
    write_dialect(tmp_path / "b.safetensors", TINY, "1 diffusers", blocks_only=True)
    assert run([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "no safetensors header" in text
    assert "LoRA for FLUX.2 tiny" in text
