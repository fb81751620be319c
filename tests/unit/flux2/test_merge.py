"""LoRAs that are merged, resized or extracted act as what they were made from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.file_faults import files_of_at_most
from tests.lora_dialects import draw_loha, draw_lokr, write_dialect
from torch import Tensor

from simpletuner.cli.main import INTERRUPTED, main
from simpletuner.config.flavours import TransformerSpec
from simpletuner.flux2.dialects import read_adapter
from simpletuner.flux2.export import attach_saved, read_lora
from simpletuner.flux2.factors import LowRank
from simpletuner.flux2.lora_formats import write_adapter
from simpletuner.flux2.tokens import context_ids, image_ids
from simpletuner.flux2.transformer import Flux2Transformer

SPEC = TransformerSpec(
    heads=2,
    head_dim=16,
    double_blocks=1,
    single_blocks=1,
    context_dim=24,
    guidance_embeds=True,
    axes=(4, 4, 4, 4),
)
Answer = Callable[..., tuple[int, str, str]]


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Answer:
    """Runs a command in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def ask(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return ask


@pytest.fixture
def told(answer: Answer) -> Callable[..., dict[str, Any]]:
    """What a command that must succeed prints with --json."""

    def ask(*arguments: object) -> dict[str, Any]:
        code, out, errors = answer(*arguments, "--json")
        assert code == 0, errors
        found: dict[str, Any] = json.loads(out)
        return found

    return ask


def deltas(path: Path) -> dict[str, Tensor]:
    """ΔW of each layer of a LoRA, in fp64."""
    found = {}
    for name, factors in read_adapter(path).modules.items():
        assert isinstance(factors, LowRank)
        found[name] = factors.b.double() @ factors.a.double() * factors.scale
    return found


def assert_acts_as(path: Path, expected: dict[str, Tensor], to: float = 1e-5) -> None:
    found = deltas(path)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= to * delta.norm(), name


def header(path: Path) -> dict[str, str]:
    return dict(read_adapter(path).header)


@pytest.mark.parametrize("lora_format", ["diffusers", "kohya"])
def test_two_loras_at_full_rank_act_as_both(
    tmp_path: Path, told: Callable[..., dict[str, Any]], lora_format: str
) -> None:
    one = write_dialect(tmp_path / "one.safetensors", SPEC, "1b diffusers with alpha", ranks=(3, 4))
    two = write_dialect(tmp_path / "two.safetensors", SPEC, "4 musubi-tuner", blocks_only=True, seed=1)
    output = tmp_path / "both.safetensors"
    loras = ("--lora", "one.safetensors:0.8", "--lora", "two.safetensors:-1.5")
    said = told("merge", *loras, "--energy", 1, "--to", lora_format, "--output", output)
    expected = {name: 0.8 * one[name] - (1.5 * two[name] if name in two else 0) for name in one}
    assert_acts_as(output, expected)
    assert said["kept"] == pytest.approx(1)
    assert said["layers"] == len(one)
    assert said["ranks"] == [3, 8]
    assert not list(tmp_path.glob(".*"))


@torch.no_grad()
def test_the_model_draws_with_one_file_as_with_both(tmp_path: Path, told: Callable[..., dict[str, Any]]) -> None:
    write_dialect(tmp_path / "one.safetensors", SPEC, "1 diffusers", ranks=(3,))
    write_dialect(tmp_path / "two.safetensors", SPEC, "3 PEFT on BFL's model", blocks_only=True, seed=1)
    told("merge", "--lora=one.safetensors:0.3", "--lora=two.safetensors:-0.2", "--rank=99", "--output=both.safetensors")

    def velocity(**strengths: float) -> Tensor:
        torch.manual_seed(0)
        transformer = Flux2Transformer(SPEC).eval()
        for name, strength in strengths.items():
            attach_saved(transformer, read_lora(tmp_path / f"{name}.safetensors"), strength=strength)
        inputs = (torch.randn(1, 6, 128), torch.randn(1, 5, SPEC.context_dim), torch.tensor([0.3]), torch.tensor([4.0]))
        made: Tensor = transformer(*inputs, image_ids(2, 3), context_ids(5))
        return made

    base, each, both = velocity(), velocity(one=0.3, two=-0.2), velocity(both=1.0)
    assert (both - each).abs().max() <= 1e-5 * each.abs().max()
    assert (base - each).abs().max() > 0.1 * each.abs().max()


def test_every_dialect_and_kind_can_be_added_up(tmp_path: Path, told: Callable[..., dict[str, Any]]) -> None:
    parts = [
        write_dialect(tmp_path / "lora.safetensors", SPEC, "7 DiffSynth", "5 mixed tools"),
        write_dialect(tmp_path / "loha.safetensors", SPEC, "2 ai-toolkit, diffusion-pipe", draw=draw_loha, ranks=(2,)),
        write_dialect(tmp_path / "lokr.safetensors", SPEC, "11 LyCORIS", draw=draw_lokr, ranks=(2,)),
    ]
    names = ("lora", "loha", "lokr")
    told("merge", *(f"--lora={name}.safetensors" for name in names), "--rank", 10_000, "--output", "all.safetensors")
    assert_acts_as(tmp_path / "all.safetensors", {name: sum(part[name] for part in parts) for name in parts[0]})


def test_one_lora_alone_keeps_its_bits(tmp_path: Path, told: Callable[..., dict[str, Any]]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        source, output = tmp_path / f"{dtype}.safetensors", tmp_path / f"{dtype}-merged.safetensors"
        write_dialect(source, SPEC, "1 diffusers", ranks=(3, 4), dtype=dtype)
        told("merge", "--lora", source, "--energy", 1, "--output", output)
        before, after = load_file(source), load_file(output)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
        assert {tensor.dtype for tensor in after.values()} == {dtype}


def test_usually_99_percent_of_the_energy_is_kept(tmp_path: Path, told: Callable[..., dict[str, Any]]) -> None:
    whole = write_dialect(tmp_path / "one.safetensors", SPEC, "1 diffusers", ranks=(8,))
    said = told("resize", "one.safetensors", "small.safetensors")
    assert 0.99 <= said["kept"] < 1
    small = deltas(tmp_path / "small.safetensors")
    for name, factors in read_adapter(tmp_path / "small.safetensors").modules.items():
        squares = torch.linalg.svdvals(whole[name]).square()
        rank = next(rank for rank in range(1, 9) if squares[:rank].sum() >= 0.99 * squares.sum())
        assert isinstance(factors, LowRank)
        assert factors.rank == rank
        assert (small[name] - whole[name]).square().sum() == pytest.approx(float(squares[rank:].sum()), rel=1e-4)


def test_a_rank_is_that_of_every_layer_that_has_it(tmp_path: Path, told: Callable[..., dict[str, Any]]) -> None:
    write_dialect(tmp_path / "one.safetensors", SPEC, "1b diffusers with alpha", ranks=(2, 6))
    said = told("resize", "one.safetensors", "small.safetensors", "--rank", 4)
    assert said["ranks"] == [2, 4]
    assert json.loads(header(tmp_path / "small.safetensors")["lora_adapter_metadata"])["transformer.r"] in (2, 4)
    assert told("resize", "one.safetensors", "smaller.safetensors", "--rank=4", "--energy=0.6")["ranks"][1] < 4


@pytest.mark.parametrize(("flags", "error"), [(("--dtype=fp32",), 0), ((), 2**-8)])
def test_what_is_not_cut_is_rounded_by_alpha_over_rank_alone(
    flags: tuple[str, ...], error: float, tmp_path: Path, told: Callable[..., dict[str, Any]]
) -> None:
    write_dialect(tmp_path / "one.safetensors", SPEC, "1b diffusers with alpha", dtype=torch.bfloat16)
    told("resize", "one.safetensors", "same.safetensors", "--rank", 999, *flags)
    same = read_adapter(tmp_path / "same.safetensors").modules
    worst = 0.0
    for name, factors in read_adapter(tmp_path / "one.safetensors").modules.items():
        kept = same[name]
        assert isinstance(factors, LowRank)
        assert isinstance(kept, LowRank)
        assert torch.equal(kept.a, factors.a.to(kept.a.dtype))
        b, found = factors.b.double() * factors.scale, kept.b.double() * kept.scale
        assert torch.equal(found, b) or factors.scale == 1.5  # the one of the file's scales that is no power of two
        worst = max(worst, float(((found - b).abs() / b.abs().clamp_min(1e-30)).max()))
    assert error / 2 <= worst <= error


def test_a_resized_lora_in_diffusers(tmp_path: Path, told: Callable[..., dict[str, Any]]) -> None:
    """The header says the ranks as PEFT wants them."""
    write_dialect(tmp_path / "one.safetensors", SPEC, "1 diffusers", ranks=(2, 6))
    told("resize", "one.safetensors", "small.safetensors", "--rank", 4)
    said = json.loads(header(tmp_path / "small.safetensors")["lora_adapter_metadata"])
    ranks = {
        name: said["transformer.rank_pattern"].get(name, said["transformer.r"])
        for name in said["transformer.target_modules"]
    }
    found = read_adapter(tmp_path / "small.safetensors").modules
    assert ranks == {name: factors.rank for name, factors in found.items() if isinstance(factors, LowRank)}


def test_the_header_says_what_was_done(tmp_path: Path, told: Callable[..., dict[str, Any]]) -> None:
    common = {"simpletuner.base_model": "black-forest-labs/FLUX.2-dev", "simpletuner.alpha": "4", "ss_epoch": "3"}
    write_dialect(tmp_path / "one.safetensors", SPEC, "1 diffusers", header=common | {"simpletuner.licence": "free"})
    write_dialect(tmp_path / "two.safetensors", SPEC, "1 diffusers", header=common, seed=1)
    loras = ("--lora", tmp_path / "one.safetensors:2", "--lora", tmp_path / "two.safetensors")
    told("merge", *loras, "--rank", 3, "--output", "both.safetensors")
    said = header(tmp_path / "both.safetensors")
    record = json.loads(said["simpletuner.merged"])
    assert [(each["file"], each["strength"]) for each in record["loras"]] == [
        ("one.safetensors", 2.0),
        ("two.safetensors", 1.0),
    ]
    assert all(len(each["sha256"]) == 64 for each in record["loras"])
    assert (record["rank"], record["energy"]) == (3, None)
    assert said["simpletuner.base_model"] == common["simpletuner.base_model"]
    assert not {"simpletuner.licence", "simpletuner.alpha", "ss_epoch"} & said.keys()
    told("resize", "both.safetensors", "small.safetensors", "--rank", 2)
    said = header(tmp_path / "small.safetensors")
    assert json.loads(said["simpletuner.resized"])["file"] == "both.safetensors"
    assert "simpletuner.merged" in said
    assert str(tmp_path) not in str(said)


def test_a_dtype_that_cannot_hold_a_number_is_refused(tmp_path: Path, answer: Answer) -> None:
    factors = {"transformer_blocks.0.attn.to_q": LowRank(torch.full((1, 32), 1e3), torch.full((32, 1), 1e3), 1.0)}
    write_adapter(tmp_path / "large.safetensors", factors, "diffusers", {})
    arguments = ("merge", "--lora", "large.safetensors:100", "--energy", 1, "--output", "out.safetensors", "--dtype")
    code, _, errors = answer(*arguments, "fp16")
    assert code == 2
    assert "100000" in errors
    assert answer(*arguments, "bf16")[0] == 0


def _nan(path: Path) -> None:
    write_dialect(path, SPEC, "1 diffusers")
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)


def _truncated(path: Path) -> None:
    write_dialect(path, SPEC, "1 diffusers")
    path.write_bytes(path.read_bytes()[:-9])


def _larger(path: Path) -> None:
    spec = TransformerSpec(
        heads=4, head_dim=16, double_blocks=1, single_blocks=1, context_dim=24, guidance_embeds=True, axes=(4, 4, 4, 4)
    )
    write_dialect(path, spec, "1 diffusers")


def _dora(path: Path) -> None:
    magnitudes = {"transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": torch.ones(32)}
    write_dialect(path, SPEC, "1 diffusers", also=magnitudes)


def _foreign(path: Path) -> None:
    save_file({"down_blocks.0.weight": torch.ones(4, 4)}, path)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (_nan, "NaN"),
    "truncated": (_truncated, "cannot be read"),
    "of another model": (_larger, "differ in shape"),
    "DoRA": (_dora, "DoRA"),
    "of another program": (_foreign, "down_blocks"),
    "a folder without one": (Path.mkdir, "no LoRA"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_together(tmp_path: Path, answer: Answer, name: str) -> None:
    make, says = BAD[name]
    write_dialect(tmp_path / "good.safetensors", SPEC, "1 diffusers")
    make(tmp_path / "bad.safetensors")
    _truncated(tmp_path / "short.safetensors")
    loras = [f"--lora={file}.safetensors" for file in ("good", "bad", "short")]
    code, out, errors = answer("merge", *loras, "--output", "out.safetensors")
    assert (code, out) == (6, "")
    assert says in errors
    assert "short.safetensors" in errors
    assert not (tmp_path / "out.safetensors").exists()


MISTAKES: dict[str, tuple[str, ...]] = {
    "no --lora": ("merge", "--output", "out.safetensors"),
    "no --output": ("merge", "--lora", "good.safetensors"),
    "missing.safetensors: no such file": ("merge", "--lora", "missing.safetensors:2", "--output", "out.safetensors"),
    "a strength of nan": ("merge", "--lora", "good.safetensors:nan", "--output", "out.safetensors"),
    "does not end in .safetensors": ("merge", "--lora", "good.safetensors", "--output", "out.bin"),
    "exists already": ("resize", "good.safetensors", "good.safetensors"),
    "the folder nowhere does not exist": ("resize", "good.safetensors", "nowhere/out.safetensors"),
    "--rank = '0'": ("resize", "good.safetensors", "out.safetensors", "--rank", "0"),
    "--energy = '99'": ("resize", "good.safetensors", "out.safetensors", "--energy", "99"),
    "--energy = 'nan'": ("resize", "good.safetensors", "out.safetensors", "--energy=nan"),
    "--to = 'sdxl'": ("resize", "good.safetensors", "out.safetensors", "--to", "sdxl"),
    "--dtype = 'fp8'": ("resize", "good.safetensors", "out.safetensors", "--dtype", "fp8"),
    "a LoRA and the file to write": ("resize", "good.safetensors"),
    "a base model, a tuned model": ("extract", "good.safetensors", "out.safetensors"),
    "nothing.safetensors: no such file": ("extract", "good.safetensors", "nothing.safetensors", "out.safetensors"),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_mistakes_are_answered_at_once(tmp_path: Path, answer: Answer, says: str) -> None:
    write_dialect(tmp_path / "good.safetensors", SPEC, "1 diffusers")
    code, out, errors = answer(*MISTAKES[says])
    assert (code, out) == (2, "")
    assert says in errors
    assert [path.name for path in tmp_path.iterdir()] == ["good.safetensors"]


def test_a_full_disk_and_an_interrupt_leave_nothing(
    tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dialect(tmp_path / "one.safetensors", SPEC, "1 diffusers")
    arguments = ("resize", "one.safetensors", "out.safetensors", "--rank", 2)
    with files_of_at_most(5000):
        code, _, errors = answer(*arguments)
    assert code == 7
    assert "out.safetensors" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]
    assert answer(*arguments)[0] == 0
    (tmp_path / "out.safetensors").unlink()

    def interrupted(*_: object) -> None:
        assert list(tmp_path.glob(".out.safetensors.*.part"))
        raise KeyboardInterrupt

    monkeypatch.setattr("simpletuner.flux2.lora_formats.unfused", interrupted)
    assert answer(*arguments)[0] == INTERRUPTED
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_what_a_loader_leaves_out_is_said(tmp_path: Path, answer: Answer, told: Callable[..., dict[str, Any]]) -> None:
    write_dialect(tmp_path / "all.safetensors", SPEC, "1 diffusers")
    write_dialect(tmp_path / "blocks.safetensors", SPEC, "1 diffusers", blocks_only=True)
    assert told("resize", "blocks.safetensors", "one.safetensors", "--rank", 2)["lost"] == {}
    lost = told("resize", "all.safetensors", "two.safetensors", "--rank", 2)["lost"]
    assert len(lost["ComfyUI"]) == 7
    assert "ComfyUI does not apply 7" in answer("resize", "all.safetensors", "three.safetensors", "--rank", 2)[1]


def test_keys_for_a_text_encoder_are_left_out_and_said(tmp_path: Path, told: Callable[..., dict[str, Any]]) -> None:
    also = {f"lora_te1_layers_0_mlp_up.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    write_dialect(tmp_path / "one.safetensors", SPEC, "1 diffusers", also=also)
    (notice,) = told("resize", "one.safetensors", "small.safetensors", "--rank", 2)["notices"]
    assert "2 keys for the text encoder" in notice
