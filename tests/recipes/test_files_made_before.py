"""Caches and a checkpoint of an earlier version, in `tests/fixtures/before-breadth`: read, and resumed from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace, tensors_below
from tests.small_decoder import make_small_decoder

from simpletuner.cli.main import main
from simpletuner.flux2.export import read_lora

MADE_BEFORE = Path(__file__).parents[1] / "fixtures" / "before-breadth"
ALL_CACHED = "Captions: 0 encoded in 0.0 s, 3 already cached.\nImages: 0 encoded in 0.0 s, 2 already cached.\n"


@pytest.fixture
def before(own_folder: Path) -> Workplace:
    """A copy of the folder, as its user finds it after an update."""
    shutil.copytree(MADE_BEFORE, own_folder, dirs_exist_ok=True)
    return Workplace(own_folder)


def cached(place: Workplace) -> dict[str, bytes]:
    return tensors_below(place.folder / "cache")


def stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def damage(path: Path) -> None:
    """Change the last byte: only a read of the file notices."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_the_run_is_resumed_from_its_checkpoint_and_exported(
    before: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = cached(before)
    assert len(caches) == 5
    assert main(["train"]) == 0
    printed = capsys.readouterr().out
    assert ALL_CACHED in printed
    assert "Resuming from step 2 of 4 (output/run/checkpoints/step-000002)." in printed
    assert cached(before) == caches

    assert [event["resumed_from"] for event in before.events("run")] == [None, 2]
    steps = before.events("step")
    assert [(event["attempt"], event["step"]) for event in steps] == [(1, 1), (1, 2), (1, 3), (2, 3), (2, 4)]
    then, now = steps[2:4]
    # The step that the killed run took after its checkpoint. fp32 holds to 1e-5 between CPUs.
    for field in ("loss", "grad_norm"):
        assert now[field] == pytest.approx(then[field], rel=1e-5)
    assert now["lr"] == then["lr"]

    old, new = (load_file(before.run().checkpoint(step) / before.run().lora.name) for step in (2, 4))
    assert old.keys() == new.keys()
    assert not any(new[name].equal(tensor) for name, tensor in old.items())
    lora = read_lora(before.run().lora)
    assert sorted(lora.layers) == ["single_transformer_blocks.1.attn.to_qkv_mlp_proj", "transformer_blocks.1.attn.to_q"]
    assert before.events("end")[-1]["lora"] == before.run().lora.name


def test_its_lists_of_known_files_are_trusted(before: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    """With the times of the copies in them, the caches read no file: damage is not noticed. Images are decoded once
    more, since the list of their scan is of an older version.
    """
    for ledger in before.folder.glob("cache/*/verified.json"):
        verified: dict[str, Any] = json.loads(ledger.read_text(encoding="utf-8"))
        for key in verified["files"]:
            path = ledger.parent / key[:2] / f"{key}.safetensors"
            damage(path)
            verified["files"][key] = stamp(path)
        ledger.write_text(json.dumps(verified), encoding="utf-8")

    assert main(["dataset", "cache"]) == 0
    assert ALL_CACHED in capsys.readouterr().out


@pytest.mark.slow
def test_its_latents_and_its_run_survive_another_decoder(
    before: Workplace, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its latents lie under a key that names the decoder: once they were used with that VAE, a note says whose they
    are. So does its checkpoint, but not the one that is made from it.
    """
    make_small_decoder(tiny_folder / "vae", before.folder / "small-decoder")
    other = ("--pretrained_vae_model_name_or_path", "small-decoder")
    caches = cached(before)
    assert main(["train"]) == 0
    capsys.readouterr()
    assert main(["train", "--max_train_steps", "5", *other]) == 0
    printed = capsys.readouterr().out
    assert ALL_CACHED in printed
    assert "Resuming from step 4 of 5" in printed
    assert cached(before) == caches


@pytest.mark.slow
def test_its_checkpoint_refuses_another_vae(
    before: Workplace, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_small_decoder(tiny_folder / "vae", before.folder / "small-decoder")
    assert main(["train", "--pretrained_vae_model_name_or_path", "small-decoder"]) == 6
    assert "VAE: not the weights or settings that output/run/checkpoints/step-000002" in capsys.readouterr().err
