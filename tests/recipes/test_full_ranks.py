"""Training a whole model on several ranks, through the real command."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.ranks import train_together
from tests.recipes.conftest import Workplace

from simpletuner.cli.main import main
from simpletuner.config.flavours import TINY
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.modelfile import read_transformer
from simpletuner.flux2.source import locate
from simpletuner.memory.shares import load_shares
from simpletuner.runs import checkpoints
from simpletuner.runs.layout import RunDirectory
from simpletuner.train.checkpoint import OPTIMIZER_STEM

pytestmark = pytest.mark.slow

FULL = {
    "model_type": "full",
    "learning_rate": 1e-4,
    "max_train_steps": 2,
    "checkpoint_step_interval": 2,
    "use_ema": True,
    "ema_decay": 0.9,
    "max_grad_norm": 0.0,
}


def train(place: Workplace, size: int, name: str, *flags: str) -> RunDirectory:
    """Train with a global batch of two micro-batches on `size` ranks."""
    place.write()
    train_together(size, f"--output_dir=output/{name}", f"--gradient_accumulation_steps={2 // size}", *flags)
    return place.run(name)


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_ranks_make_the_model_of_one_process_to_the_bit(
    cached_workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    place = cached_workplace
    place.config.pop("lora_rank")
    place.config |= FULL
    alone = train(place, 1, "alone", "--mixed_precision=bf16")
    sharded = train(
        place, 2, "sharded", "--mixed_precision=bf16", "--fsdp_enable=true", "--gradient_checkpointing=true"
    )
    replicated = train(place, 2, "replicated", "--mixed_precision=bf16")
    for run in (sharded, replicated):
        for name in ("transformer.safetensors", "ema/transformer.safetensors"):
            one, two = load_file(alone.root / name), load_file(run.root / name)
            assert all(torch.equal(two[key], tensor) for key, tensor in one.items())
        for one, two in ((run.model, alone.model), (run.root / "ema" / "model", alone.root / "ema" / "model")):
            assert {name for name in files_below(one) if "diffusion_pytorch_model" not in name} == {
                name for name in files_below(two) if "diffusion_pytorch_model" not in name
            }
        # The two files of the last checkpoint and their index, as diffusers reads them.
        assert (
            read_transformer(run.model / "transformer").keys() == read_transformer(alone.model / "transformer").keys()
        )
        assert locate(ModelOptions(pretrained_model_name_or_path=str(run.model)), report=print).spec == TINY
        assert (
            load_shares(run.checkpoint(2), OPTIMIZER_STEM).keys()
            == load_file(alone.checkpoint(2) / "optimizer.safetensors").keys()
        )
    assert "Sharded: each of 2 processes holds 10.8 MiB of the weights" in sharded.log.read_text()
    assert main(["checkpoint", "verify", str(sharded.root)]) == 0
    assert "step 2: good" in capsys.readouterr().out


def test_one_process_goes_on_where_two_sharded_ranks_were(cached_workplace: Workplace) -> None:
    place = cached_workplace
    place.config.pop("lora_rank")
    place.config |= FULL | {"mixed_precision": "bf16", "max_train_steps": 3, "checkpoint_step_interval": 1}
    alone = train(place, 1, "alone")
    train(place, 2, "both", "--fsdp_enable=true", "--max_train_steps=2")
    both = train(place, 1, "both")
    for name in ("optimizer.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        one, two = load_file(alone.checkpoint(3) / name), load_file(both.checkpoint(3) / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(two[key], tensor) for key, tensor in one.items())
    assert place.losses("both") == place.losses("alone")


def test_ranks_share_out_what_a_lora_resumes_with(cached_workplace: Workplace) -> None:
    place = cached_workplace
    place.config |= {"max_train_steps": 2, "checkpoint_step_interval": 2}
    alone, two = train(place, 1, "alone"), train(place, 2, "two")
    folder = two.checkpoint(2)
    assert files_below(folder) == {
        "manifest.json", "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors",
        "pytorch_lora_weights.safetensors", "state.json",
    }  # fmt: skip
    assert checkpoints.damage(folder) is None
    one, shares = load_file(alone.checkpoint(2) / "optimizer.safetensors"), load_shares(folder, OPTIMIZER_STEM)
    assert one.keys() == shares.keys()
    assert all(torch.equal(shares[name], tensor) for name, tensor in one.items())
    one, shares = load_file(alone.lora), load_file(two.lora)
    assert all(torch.equal(shares[name], tensor) for name, tensor in one.items())
