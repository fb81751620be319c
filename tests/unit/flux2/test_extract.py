"""A LoRA that is taken from two models gives the second one back, as far as its rank allows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.unit.flux2.test_load import bfl_tensors
from torch import Tensor

from simpletuner.base.errors import AccessError, CheckpointError, UserError
from simpletuner.cli.main import main
from simpletuner.config.flavours import TransformerSpec
from simpletuner.flux2.dialects import read_adapter
from simpletuner.flux2.extract import WeightDifferences, differences
from simpletuner.flux2.factors import LowRank
from simpletuner.flux2.lowrank import RankRule
from simpletuner.flux2.modelfile import WEIGHTS_NAME, save_transformer
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.transformer_file import opened_transformer

SPEC = TransformerSpec(
    heads=2,
    head_dim=16,
    double_blocks=1,
    single_blocks=1,
    context_dim=24,
    guidance_embeds=True,
    axes=(4, 4, 4, 4),
)
Q = "transformer_blocks.0.attn.to_q.weight"
NORM = "transformer_blocks.0.attn.norm_q.weight"
CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


def base_weights() -> Tensors:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {name: tensor.clone() for name, tensor in Flux2Transformer(SPEC).state_dict().items()}


def tuned_weights(rank: int | None = None) -> Tensors:
    """Every Linear moved, by a delta of full rank or of `rank`."""
    generator = torch.Generator().manual_seed(1)
    weights = base_weights()
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            rows, columns = tensor.shape
            if rank is None:
                delta = torch.randn(rows, columns, generator=generator)
            else:
                delta = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
            weights[name] = tensor + 0.1 * delta
    return weights


def as_folder(path: Path, weights: Tensors) -> Path:
    save_transformer(path, SPEC, weights, metadata={"base_model": "acme/base"}, dtype=torch.float32)
    return path


def as_pipeline(path: Path, weights: Tensors) -> Path:
    as_folder(path / "transformer", weights)
    return path


def as_bfl(path: Path, weights: Tensors) -> Path:
    save_file(bfl_tensors(weights, SPEC), path := path.with_suffix(".safetensors"))
    return path


def as_comfyui(path: Path, weights: Tensors) -> Path:
    beside = {"vae.bn.running_mean": torch.ones(4)}
    renamed = {f"model.diffusion_model.{name}": tensor for name, tensor in bfl_tensors(weights, SPEC).items()}
    save_file(renamed | beside, path := path.with_suffix(".safetensors"))
    return path


Save = Callable[[Path, Tensors], Path]
LAYOUTS: dict[str, tuple[Save, Save]] = {
    "folders": (as_folder, as_folder),
    "a pipeline and a single file": (as_pipeline, as_bfl),
    "a single file and a folder": (as_bfl, as_folder),
    "an all-in-one checkpoint": (as_folder, as_comfyui),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_full_rank_the_tuned_model_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    tuned = tuned_weights()
    base = LAYOUTS[layout][0](tmp_path / "base", base_weights())
    model = LAYOUTS[layout][1](tmp_path / "tuned", tuned)
    output = tmp_path / "lora.safetensors"
    assert main(["extract", str(base), str(model), str(output), "--energy=1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kept"], said["notices"]) == (pytest.approx(1), [])
    weights = base_weights()
    modules = read_adapter(output).modules
    assert len(modules) == said["layers"] == sum(tensor.ndim == 2 for tensor in weights.values())
    for name, factors in modules.items():
        assert isinstance(factors, LowRank)
        assert factors.rank == min(factors.shape)
        weights[f"{name}.weight"] += factors.delta()
    for name, tensor in tuned.items():
        assert (weights[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name


def test_a_folder_with_a_variant_alone_is_refused_with_the_file_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = as_folder(tmp_path / "base", base_weights()), as_folder(tmp_path / "tuned", tuned_weights())
    file = (tuned / WEIGHTS_NAME).rename(tuned / "diffusion_pytorch_model.bf16.safetensors")
    output = tmp_path / "lora.safetensors"
    assert main(["extract", str(base), str(tuned), str(output)]) == AccessError.exit_code
    assert f"Give the file itself: {file}" in " ".join(capsys.readouterr().err.split())
    assert main(["extract", str(base), str(file), str(output)]) == 0
    for part in (1, 2):
        shutil.copy(file, tuned / f"diffusion_pytorch_model.fp16-0000{part}-of-00002.safetensors")
    assert main(["extract", str(base), str(tuned), str(tmp_path / "other.safetensors")]) == AccessError.exit_code
    assert "Rename the files without the variant." in capsys.readouterr().err


def found_in(base: Path, tuned: Path, rule: RankRule) -> tuple[WeightDifferences, dict[str, LowRank]]:
    with opened_transformer(base) as first, opened_transformer(tuned) as second:
        found = differences(first, second, rule, CPU, lambda names: names)
        return found, {name: reduced.factors for name, reduced in found.layers}


def test_a_delta_of_low_rank_is_found_at_its_rank(tmp_path: Path) -> None:
    base, tuned = as_folder(tmp_path / "base", base_weights()), as_folder(tmp_path / "tuned", tuned_weights(rank=3))
    _, layers = found_in(base, tuned, RankRule(energy=0.9999))
    assert {factors.rank for factors in layers.values()} <= {1, 2, 3}
    for name, tensor in tuned_weights(rank=3).items():
        if tensor.ndim == 2:
            delta = tensor - base_weights()[name]
            found = layers[name.removesuffix(".weight")].delta()
            assert (found - delta).norm() <= 0.011 * delta.norm()


def test_what_did_not_change_is_not_in_the_lora(tmp_path: Path) -> None:
    tuned = base_weights()
    tuned[Q] += 1
    tuned[NORM] += 0.5
    found, layers = found_in(
        as_folder(tmp_path / "base", base_weights()), as_folder(tmp_path / "tuned", tuned), RankRule(rank=2)
    )
    assert layers.keys() == {Q.removesuffix(".weight")}
    assert found.other_differences == {NORM: pytest.approx(0.5)}


def test_a_norm_that_differs_is_said_and_the_header_says_the_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = {name: tensor.bfloat16() for name, tensor in tuned_weights().items()}
    tuned[NORM] = tuned[NORM] + 0.5
    base, model = as_folder(tmp_path / "base", base_weights()), as_bfl(tmp_path / "tuned", tuned)
    output = tmp_path / "lora.safetensors"
    assert main(["extract", str(base), str(model), str(output), "--rank=4"]) == 0
    printed = capsys.readouterr().out
    assert f"1 weights that a LoRA cannot hold differ, by at most 0.5 ({NORM})" in printed
    file = read_adapter(output)
    record = json.loads(file.header["simpletuner.extracted"])
    assert record == {"base": "base", "tuned": "tuned.safetensors", "rank": 4, "energy": None}
    assert str(tmp_path) not in str(file.header)
    kinds = {factors.a.dtype for factors in file.modules.values() if isinstance(factors, LowRank)}
    assert kinds == {torch.bfloat16}


def _equal(base: Path, tuned: Path) -> tuple[Path, Path]:
    return as_folder(base, base_weights()), as_folder(tuned, base_weights())


def _other_shapes(base: Path, tuned: Path) -> tuple[Path, Path]:
    return as_folder(base, base_weights()), as_folder(tuned, base_weights() | {Q: torch.ones(64, 32)})


def _nan(base: Path, tuned: Path) -> tuple[Path, Path]:
    return as_folder(base, base_weights()), as_bfl(tuned, base_weights() | {Q: torch.full((32, 32), torch.nan)})


def _no_transformer(base: Path, tuned: Path) -> tuple[Path, Path]:
    tuned.mkdir()
    return as_folder(base, base_weights()), tuned


def _a_lora(base: Path, tuned: Path) -> tuple[Path, Path]:
    save_file({"transformer.x_embedder.lora_A.weight": torch.ones(1, 2)}, file := tuned.with_suffix(".safetensors"))
    return as_folder(base, base_weights()), file


def _truncated(base: Path, tuned: Path) -> tuple[Path, Path]:
    file = as_bfl(tuned, base_weights())
    file.write_bytes(file.read_bytes()[:-9])
    return as_folder(base, base_weights()), file


def _unscaled_int8(base: Path, tuned: Path) -> tuple[Path, Path]:
    tuned_model = base_weights()
    name = "single_transformer_blocks.0.attn.to_out.weight"
    tuned_model[name] = torch.ones(tuned_model[name].shape, dtype=torch.int8)
    return as_folder(base, base_weights()), as_bfl(tuned, tuned_model)


def _shard_missing(base: Path, tuned: Path) -> tuple[Path, Path]:
    folder = as_folder(tuned, base_weights())
    (file,) = folder.glob("*.safetensors")
    file.rename(folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    return as_folder(base, base_weights()), folder


BAD: dict[str, tuple[Callable[[Path, Path], tuple[Path, Path]], type[UserError], str]] = {
    "equal": (_equal, CheckpointError, "no layer"),
    "another model": (_other_shapes, CheckpointError, "64 × 32, and 32 × 32 in the base"),
    "NaN": (_nan, CheckpointError, "1,024 numbers"),
    "no transformer": (_no_transformer, AccessError, "tuned"),
    "a LoRA": (_a_lora, AccessError, "FLUX.2 transformer"),
    "truncated": (_truncated, AccessError, "by its own header"),
    "int8 without scales": (_unscaled_int8, AccessError, "holds int8 weights without scales"),
    "a shard is missing": (_shard_missing, CheckpointError, "lacks"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, kind, says = BAD[name]
    base, tuned = make(tmp_path / "base", tmp_path / "tuned")
    before = sorted(tmp_path.iterdir())
    assert main(["extract", str(base), str(tuned), str(tmp_path / "lora.safetensors")]) == kind.exit_code
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.out == ""
    assert sorted(tmp_path.iterdir()) == before
