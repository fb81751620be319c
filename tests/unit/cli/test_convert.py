"""`simpletuner convert`, as it is typed."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.lora_dialects import ROWS, draw_loha, write_dialect

from simpletuner.base.errors import CheckpointError, ConfigError, UserError
from simpletuner.cli.convert import run
from simpletuner.cli.main import main
from simpletuner.config.flavours import TransformerSpec
from simpletuner.flux2.dialects import read_adapter
from simpletuner.flux2.lora_formats import LORA_FORMATS, lora_modules
from simpletuner.flux2.spec import transformer_to_diffusers
from simpletuner.flux2.transformer import Flux2Transformer

SPEC = TransformerSpec(
    heads=2, head_dim=16, double_blocks=1, single_blocks=1, context_dim=24, guidance_embeds=True, axes=(4, 4, 4, 4)
)
DIFFUSERS, COMFYUI, KOHYA = "1 diffusers", "2 ai-toolkit, diffusion-pipe", "4 musubi-tuner"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("row", "formats"), [*((row, [at % 4]) for at, row in enumerate(ROWS)), (KOHYA, range(4))])
def test_every_dialect_is_converted(
    here: Path, row: str, formats: Iterable[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """To one format each, one of them to all: the effect to 1e-5, with alphas, mixed ranks and outer layers."""
    deltas = write_dialect(here / "in.safetensors", SPEC, row, ranks=(2, 3))
    for to in (list(LORA_FORMATS)[at] for at in formats):
        assert run(["in.safetensors", f"{to}.safetensors", "--to", to, "--allow-loss", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["kind"], told["to"], told["layers"], told["left_out"]) == ("lora", to, len(deltas), {})
        assert told["from"] == read_adapter(here / "in.safetensors").dialect
        assert told["bytes"] == (here / f"{to}.safetensors").stat().st_size
        file = read_adapter(here / f"{to}.safetensors")
        assert file.dialect == to
        modules = lora_modules(file)
        assert modules.keys() == deltas.keys()
        for name, expected in deltas.items():
            found = modules[name].b.double() @ modules[name].a.double()
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_what_a_loader_would_lose_is_an_error_until_it_is_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dialect(here / "in.safetensors", SPEC, DIFFUSERS)
    for to, loader, count in (("diffusers", "ComfyUI", 7), ("comfyui", "diffusers", 1), ("kohya", "diffusers", 6)):
        with pytest.raises(CheckpointError, match=f"{loader} .* {count} of this LoRA's 25 layers.* --allow-loss"):
            run(["in.safetensors", "out.safetensors", "--to", to])
        assert [path.name for path in here.iterdir()] == ["in.safetensors"]
    assert run(["in.safetensors", "out.safetensors", "--to", "comfyui", "--allow-loss"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("out.safetensors: a LoRA on 25 layers in the comfyui format, ")
    assert second == (
        "In the comfyui format, diffusers misapplies 1 of this LoRA's 25 layers, such as norm_out.linear. "
        "It reads all layers in the diffusers format."
    )


@pytest.mark.parametrize("to", LORA_FORMATS)
def test_blocks_alone_lose_nothing(here: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A format that ComfyUI does not read at all is no mistake, but said."""
    write_dialect(here / "in.safetensors", SPEC, KOHYA, blocks_only=True)
    assert run(["in.safetensors", "out.safetensors", "--to", to]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == (
        [
            "In the bfl format, ComfyUI reads none of this LoRA's layers. "
            "It reads all layers in the diffusers, comfyui or kohya format."
        ]
        if to == "bfl"
        else []
    )


def test_keys_of_no_layer_are_an_error_until_they_are_to_be_left_out(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"lora_te1_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(1, 4)}
    write_dialect(here / "in.safetensors", SPEC, KOHYA, blocks_only=True, also=text)
    with pytest.raises(
        CheckpointError, match=r"contains 1 keys that are not layers .*lora_te1.*text encoder.* --allow-loss"
    ):
        run(["in.safetensors", "out.safetensors", "--to", "diffusers"])
    assert run(["in.safetensors", "out.safetensors", "--to", "diffusers", "--allow-loss", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == dict.fromkeys(text, "text encoder")
    assert not any("te1" in key for key in load_file("out.safetensors"))


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _with_nan(path: Path) -> None:
    tensors = load_file(path)
    tensors[min(tensors)].view(-1)[0] = float("nan")
    save_file(tensors, path)


def _loha(path: Path) -> None:
    write_dialect(path, SPEC, COMFYUI, draw=draw_loha)


def _dora(path: Path) -> None:
    key = "transformer.transformer_blocks.0.attn.to_q"
    pair = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
    save_file(pair | {f"{key}.lora_magnitude_vector": torch.ones(32)}, path)


def _patches(path: Path) -> None:
    save_file({"diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": torch.ones(16)}, path)


def _foreign(path: Path) -> None:
    save_file({"transformer.blocks.0.attn.lora_A.weight": torch.ones(1, 4)}, path)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (_truncated, "complete"),
        (_with_nan, "NaN"),
        (_loha, "LoKr or LoHa factors for"),
        (_dora, r"holds DoRA \(PEFT\) in 3 keys, .* diffusers and PEFT can apply it"),
        (_patches, r"holds patches of whole tensors \(\.diff\) in 1 keys, .* ComfyUI can apply it"),
        (_foreign, "none of its 1 keys"),
        (Path.unlink, "no file or folder at in.safetensors"),
        (lambda path: path.write_bytes(b""), "header"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(100)), "GGUF"),
    ],
)
def test_what_is_no_whole_lora_is_refused(here: Path, damage: Callable[[Path], object], found: str) -> None:
    path = here / "in.safetensors"
    write_dialect(path, SPEC, COMFYUI)
    damage(path)
    before = sorted(here.iterdir())
    with pytest.raises(UserError, match=found):
        run(["in.safetensors", "out.safetensors", "--to", "kohya", "--allow-loss"])
    assert sorted(here.iterdir()) == before


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ([], "IN and OUT"),
        (["in.safetensors", "--to", "kohya"], "IN and OUT"),
        (["in.safetensors", "out.safetensors"], "--to is not given"),
        (["in.safetensors", "out.safetensors", "--to", "comfyi"], "Did you mean --to comfyui"),
        (["in.safetensors", "out.safetensors", "more", "--to", "kohya"], "more: no such flag"),
        (["in.safetensors", "in.safetensors", "--to", "kohya"], "exists already"),
        (["in.safetensors", ".", "--to", "kohya"], "does not end in .safetensors"),
        (["in.safetensors", "out.ckpt", "--to", "kohya"], "does not end in .safetensors"),
        (["in.safetensors", "none/out.safetensors", "--to", "kohya"], "the folder none does not exist"),
    ],
)
def test_what_is_typed_wrong_is_said(typed: list[str], found: str) -> None:
    write_dialect(Path("in.safetensors"), SPEC, COMFYUI, blocks_only=True)
    with pytest.raises(ConfigError, match=found):
        run(typed)


def test_a_runs_folder_is_its_lora(here: Path) -> None:
    (here / "run").mkdir()
    write_dialect(here / "run" / "pytorch_lora_weights.safetensors", SPEC, DIFFUSERS, blocks_only=True)
    assert run(["run", "out.safetensors", "--to", "kohya"]) == 0
    assert read_adapter(here / "out.safetensors").dialect == "kohya"


def test_a_model_is_told_from_a_lora_and_comes_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "model").mkdir()
    weights = Flux2Transformer(SPEC).state_dict()
    save_file(weights, "model/diffusion_pytorch_model.safetensors")
    (here / "model" / "config.json").write_text(json.dumps(transformer_to_diffusers(SPEC)))
    assert run(["model", "single.safetensors", "--to", "comfyui", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["target"], told["left_out"]) == ("model", "single.safetensors", 0)
    assert run(["model", "other.safetensors", "--to", "comfyui", "--allow-loss"]) == 0
    assert "--allow-loss has no effect" in capsys.readouterr().err
    assert "double_blocks.0.img_attn.qkv.weight" in load_file("single.safetensors")
    assert run(["single.safetensors", "back", "--to", "diffusers"]) == 0
    assert capsys.readouterr().out.startswith(f"back: a transformer of {len(weights)} tensors, ")
    back = load_file("back/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    with pytest.raises(ConfigError):
        run(["single.safetensors", "kohya.safetensors", "--to", "kohya"])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    assert "--allow-loss" in capsys.readouterr().out
