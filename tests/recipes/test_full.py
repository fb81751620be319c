"""Training every weight of the embedded model, through the real command."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tests.recipes.conftest import PICTURES, Workplace

from simpletuner.base import machine
from simpletuner.base.files import sha256_json
from simpletuner.cli.main import main
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.load import load_transformer
from simpletuner.flux2.source import locate
from simpletuner.runs.finished import missing_result

WEIGHTS = "diffusion_pytorch_model.safetensors"
FULL = {"model_type": "full", "learning_rate": 1e-4}
DRAWN = {
    "validation_disable": False,
    "validation_resolution": "64x48",
    "validation_num_inference_steps": 3,
    "validation_step_interval": 100,
}

# Losses of CONFIG's three steps; tolerances as in test_train.py. The first is the base model's, as a LoRA's is.
PINNED = {"no": [1.3900223, 1.1761433, 1.3819169], "bf16": [1.3881238, 1.2093047, 1.4900421]}


@pytest.fixture
def workplace(cached_workplace: Workplace) -> Workplace:
    """One whose runs train the whole model."""
    for name in ("lora_rank", "lora_alpha"):
        cached_workplace.config.pop(name, None)
    cached_workplace.config |= FULL
    return cached_workplace


def weights(place: Workplace, name: str = "run", folder: str = "") -> dict[str, torch.Tensor]:
    return load_file(place.run(name).root / folder / "model" / "transformer" / WEIGHTS)


def assert_in_bfl_layout(single: Path, exported: Path) -> None:
    """`single` has the numbers of `exported` and its header, under the names by which ComfyUI tells a FLUX.2."""
    with safe_open(single, framework="pt") as bfl, safe_open(exported, framework="pt") as own:
        assert bfl.metadata() == own.metadata()
        name = "double_stream_modulation_img"
        assert torch.equal(bfl.get_tensor(f"{name}.lin.weight"), own.get_tensor(f"{name}.linear.weight"))
        parts = [own.get_tensor(f"transformer_blocks.1.attn.to_{part}.weight") for part in "qkv"]
        assert torch.equal(bfl.get_tensor("double_blocks.1.img_attn.qkv.weight"), torch.cat(parts))
    assert sum(tensor.numel() for tensor in load_file(single).values()) == sum(
        tensor.numel() for tensor in load_file(exported).values()
    )


def base_weights() -> dict[str, torch.Tensor]:
    """The embedded model's, fp32."""
    source = locate(ModelOptions(model_flavour="tiny"), report=print)
    return dict(load_transformer(source, torch.float32, "cpu").state_dict())


def trained_bytes(place: Workplace, run: str) -> dict[str, bytes]:
    """All that a run leaves of what it learned."""
    root = place.run(run).root
    files = [*root.glob("*.safetensors"), *root.glob("*/transformer.safetensors")]
    files += [*root.glob("model/transformer/*"), *root.glob("checkpoints/**/*.safetensors")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_losses_are_what_they_were(workplace: Workplace, precision: str) -> None:
    workplace.config["mixed_precision"] = precision
    assert workplace.train() == 0
    assert workplace.losses() == pytest.approx(PINNED[precision], rel=1e-5 if precision == "no" else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_rate_of_nothing_leaves_every_bit_of_the_base(workplace: Workplace, precision: str) -> None:
    workplace.config |= {"learning_rate": 1e-37, "mixed_precision": precision, "max_train_steps": 2}
    assert workplace.train() == 0
    base, found = base_weights(), weights(workplace)
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())


def test_every_weight_learns(workplace: Workplace) -> None:
    workplace.config |= {"max_train_steps": 1, "caption_dropout_probability": 0.0}
    assert workplace.train() == 0
    base, found = base_weights(), weights(workplace)
    assert [name for name, tensor in base.items() if torch.equal(found[name], tensor)] == []


@pytest.mark.slow
def test_what_must_change_nothing_changes_no_bit(workplace: Workplace) -> None:
    """Recomputing, and routes that keep every token."""
    route = {"routes": [{"selection_ratio": 1.0, "start_layer_idx": 1, "end_layer_idx": -2}]}
    flags = {
        "plain": ["--gradient_checkpointing=false"],
        "recomputed": ["--gradient_checkpointing=true"],
        "routed": ["--gradient_checkpointing=false", f"--tread_config={json.dumps(route)}"],
    }
    workplace.config |= {"max_train_steps": 2, "mixed_precision": "bf16"}
    for name, chosen in flags.items():
        assert workplace.train(f"--output_dir=output/{name}", *chosen) == 0
    reference = weights(workplace, "plain")
    for name in ("recomputed", "routed"):
        assert workplace.losses(name) == workplace.losses("plain")
        assert all(tensor.equal(reference[key]) for key, tensor in weights(workplace, name).items())


WAYS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "fp32": ({"mixed_precision": "no"}, set()),
    "masters": ({"mixed_precision": "bf16"}, set()),
    "masters, saved as bf16": ({"mixed_precision": "bf16", "model_save_dtype": "bf16"}, {"parameter", "average"}),
    "bf16": ({"mixed_precision": "bf16", "optimizer": "adamw_bf16"}, {"average"}),
    "schedule-free": ({"mixed_precision": "bf16", "optimizer": "adamw_schedulefree"}, {"parameter"}),
    "muon": ({"mixed_precision": "bf16", "optimizer": "muon"}, set()),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_goes_on_ends_the_same_and_keeps_nothing_twice(workplace: Workplace, way: str) -> None:
    options, kept = WAYS[way]
    workplace.config |= options | {"use_ema": True, "ema_decay": 0.5, "checkpoint_step_interval": 2}
    assert workplace.train("--output_dir=output/straight") == 0
    assert workplace.train("--max_train_steps=2") == 0
    assert workplace.train() == 0
    assert [event["resumed_from"] for event in workplace.events("run")] == [None, 2]
    assert trained_bytes(workplace, "run") == trained_bytes(workplace, "straight")
    assert workplace.losses() == workplace.losses("straight")
    with safe_open(workplace.run().checkpoint(3) / "optimizer.safetensors", "pt") as file:
        entries = {name.partition("/")[0] for name in file.keys()}  # noqa: SIM118  not a dict
    assert entries & {"parameter", "average"} == kept
    dtype = torch.bfloat16 if way in ("bf16", "masters, saved as bf16") else torch.float32
    assert {tensor.dtype for tensor in weights(workplace).values()} == {dtype}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "prodigy"])
def test_killed_and_started_again_it_ends_the_same(workplace: Workplace, name: str) -> None:
    """With fp32 masters; with bf16 weights; with the state of all steps. What each optimizer keeps is that of a LoRA's
    run, which `test_optimizers.py` kills with each.
    """
    workplace.config |= {
        "optimizer": name,
        "learning_rate": 1.0 if name == "prodigy" else 1e-4,
        "mixed_precision": "bf16",
    }
    workplace.config |= {"max_train_steps": 4, "gradient_accumulation_steps": 1, "checkpoint_step_interval": 2}
    workplace.config |= {"use_ema": True, "ema_decay": 0.5}
    assert workplace.train("--output_dir=output/straight") == 0
    killed = workplace.train_apart(kill_at="checkpoint:4" if name == "prodigy" else "step:3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert workplace.train() == 0
    assert [event["resumed_from"] for event in workplace.events("run")] == [None, 2]
    assert trained_bytes(workplace, "run") == trained_bytes(workplace, "straight")
    assert workplace.losses() == workplace.losses("straight")
    assert all(tensor.isfinite().all() for tensor in weights(workplace).values())
    assert not all(tensor.equal(base_weights()[key].to(tensor.dtype)) for key, tensor in weights(workplace).items())


RELEASED = {
    "optimizer_release_gradients": True, "grad_clip_method": "value", "max_grad_norm": 0.5, "mixed_precision": "bf16",
    "gradient_accumulation_steps": 1, "use_ema": True, "ema_decay": 0.5,
}  # fmt: skip


@pytest.mark.slow
def test_released_gradients_change_no_bit(workplace: Workplace) -> None:
    """Recomputed blocks and a moving average included."""
    workplace.config |= RELEASED | {"optimizer": "adamw_bf16", "gradient_checkpointing": True}
    assert workplace.train() == 0
    assert workplace.train("--output_dir=output/ordinary", "--optimizer_release_gradients=false") == 0
    assert workplace.losses() == workplace.losses("ordinary")
    norms = [[event["grad_norm"] for event in workplace.events("step", name)] for name in ("run", "ordinary")]
    assert norms[0] == norms[1]
    for folder in ("", "ema"):
        reference = weights(workplace, "ordinary", folder)
        assert all(tensor.equal(reference[key]) for key, tensor in weights(workplace, folder=folder).items())


@pytest.mark.slow
def test_adafactor_on_bf16_weights_is_killed_and_ends_the_same(workplace: Workplace) -> None:
    workplace.config |= RELEASED | {"optimizer": "adafactor", "learning_rate": 1e-3, "max_train_steps": 4}
    workplace.config["checkpoint_step_interval"] = 2
    assert workplace.train("--output_dir=output/straight") == 0
    killed = workplace.train_apart(kill_at="step:3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert workplace.train() == 0
    assert [event["resumed_from"] for event in workplace.events("run")] == [None, 2]
    assert trained_bytes(workplace, "run") == trained_bytes(workplace, "straight")
    assert workplace.losses() == workplace.losses("straight")
    audit = json.loads((workplace.run().root / "weights.json").read_text())
    assert (audit["dtype"], audit["master_bytes"]) == ("bfloat16", 0)
    base = base_weights()
    unmoved = [key for key, tensor in weights(workplace).items() if tensor.equal(base[key].to(tensor.dtype))]
    assert unmoved == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["export:1", "export:2", "export:4"])
def test_killed_while_it_exports_it_is_complete_at_the_next_start(workplace: Workplace, moment: str) -> None:
    """Between the single file and the folder; between the model and its average; before finished.json."""
    workplace.config |= {"max_train_steps": 1, "use_ema": True, "ema_decay": 0.5}
    killed = workplace.train_apart(kill_at=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = workplace.run()
    assert not run.finished.exists()
    assert workplace.train() == 0
    assert missing_result(run, 1) is None
    products = json.loads(run.finished.read_text())["products"]
    for folder in ("", "ema/"):
        assert {f"{folder}transformer.safetensors", f"{folder}model/model_index.json"} <= products.keys()
        saved = run.checkpoint(1) / folder / "transformer" / WEIGHTS
        assert (run.root / folder / "model" / "transformer" / WEIGHTS).samefile(saved)
    assert [event["phase"] for event in workplace.events("phase")].count("load") == 2, "loaded by the first start alone"
    assert not list(run.root.rglob(".*"))
    end = workplace.events("end")[-1]
    assert (end["model"], end["ema_model"]) == ("model", "ema/model")


@pytest.mark.slow
def test_a_full_run_is_a_directory_that_anyone_can_read(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.config |= {"max_train_steps": 1, "use_ema": True, "ema_decay": 0.0, "modelspec_comment": "by a test"}
    workplace.config["modelspec_trigger_phrase"] = "a zorb"
    assert workplace.train() == 0
    root = workplace.run().root
    assert {path.name for path in root.iterdir()} == {
        "checkpoints", "config.json", "control", "datasets.json", "ema", "events.jsonl", "finished.json", "lock",
        "model", "run.log", "transformer.safetensors", "weights.json",
    }  # fmt: skip
    checkpoint = workplace.run().checkpoint(1)
    assert {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()} == {
        "manifest.json", "optimizer.safetensors", "state.json", "transformer/config.json", f"transformer/{WEIGHTS}",
        "ema/transformer/config.json", f"ema/transformer/{WEIGHTS}",
    }  # fmt: skip
    assert {path.name for path in (root / "model").iterdir()} == {
        "model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae",
    }  # fmt: skip
    single = root / "transformer.safetensors"
    exported = root / "model" / "transformer" / WEIGHTS
    assert os.path.samefile(exported, checkpoint / "transformer" / WEIGHTS)
    assert_in_bfl_layout(single, exported)
    average = root / "ema" / "transformer.safetensors"
    assert_in_bfl_layout(average, root / "ema" / "model" / "transformer" / WEIGHTS)
    assert average.read_bytes() == single.read_bytes()  # without decay it is the live model

    with safe_open(single, framework="pt") as file:
        header = file.metadata()
    assert header.pop("format") == "pt"
    said = {name: text for name, text in header.items() if name.startswith("modelspec.")}
    assert (said["modelspec.architecture"], said["modelspec.resolution"]) == ("Flux.2-tiny", "64x64")
    assert (said["modelspec.description"], said["modelspec.trigger_phrase"]) == ("by a test", "a zorb")
    fields = {"base_model", "comment", "config", "datasets", "licence", "options", "run", "step", "trigger_phrase"}
    assert header.keys() - said.keys() == {f"simpletuner.{field}" for field in fields | {"version"}}
    assert sha256_json(json.loads(header["simpletuner.options"])) == header["simpletuner.config"]
    assert header["simpletuner.comment"] == "by a test"
    assert str(workplace.folder).encode() not in single.read_bytes()
    audit = json.loads((root / "weights.json").read_text())
    base = base_weights()
    assert (audit["tensors"], audit["parameters"]) == (len(base), sum(tensor.numel() for tensor in base.values()))
    assert workplace.events("run")[0]["trainable"] == audit["parameters"]
    end = workplace.events("end")[-1]
    assert (end["lora"], end["model"], end["ema_model"]) == (None, "model", "ema/model")

    text = capsys.readouterr().out
    assert f"The whole transformer: {audit['parameters']:,} trainable parameters in {audit['tensors']} tensors" in text
    assert "simpletuner sample --run output/run" in text
    assert workplace.train() == 0
    assert "This run is finished: 1 steps, output/run/model" in capsys.readouterr().out
    assert workplace.train("--max_train_steps=2") == 0  # what is there is replaced
    assert not os.path.samefile(exported, checkpoint / "transformer" / WEIGHTS)
    assert_in_bfl_layout(single, exported)


@pytest.mark.slow
def test_the_model_draws_the_same_in_diffusers_in_sample_and_in_the_run(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import Flux2Pipeline

    workplace.prompts = {"one": "a gradient"}
    workplace.config |= DRAWN | {"learning_rate": 1e-3, "max_train_steps": 2, "vae_enable_tiling": False}
    assert workplace.train() == 0
    root = workplace.run().root
    capsys.readouterr()
    shared = ["--prompt", "a gradient", "--mixed_precision=no", "--vae_dtype=fp32", "--model_flavour=tiny"]
    shared += ["--width=64", "--height=48", "--steps=3", "--guidance=4"]
    for place in ("model", "transformer.safetensors"):
        assert main(["sample", f"--pretrained_model_name_or_path={root / place}", *shared]) == 0
    transformer = f"--pretrained_transformer_model_name_or_path={root / 'model' / 'transformer'}"
    assert main(["sample", transformer, *shared]) == 0
    assert main(["sample", f"--run={root}", "--prompt=a gradient"]) == 0
    drawn = [np.asarray(Image.open(line)) for line in capsys.readouterr().out.splitlines()]
    with Image.open(root / "validation" / "step-000002" / "one_64x48_0.png") as image:
        drawn.append(np.asarray(image))
    assert all(np.array_equal(drawn[0], other) for other in drawn[1:])
    with Image.open(root / "validation" / "step-000000" / "one_64x48_0.png") as image:
        assert not np.array_equal(drawn[0], np.asarray(image))

    pipe = Flux2Pipeline.from_pretrained(root / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 128, 3, 4), generator=torch.Generator().manual_seed(42))
    (theirs,) = pipe(
        prompt="a gradient", latents=noise, height=48, width=64, num_inference_steps=3, guidance_scale=4.0,
        max_sequence_length=64, output_type="np",
    ).images  # fmt: skip
    # A value just between two levels may round either way.
    assert np.abs(drawn[0].astype(np.int16) - (theirs * 255).round().astype(np.int16)).max() <= 1


@pytest.mark.slow
def test_the_base_pictures_are_drawn_before_the_first_step_and_missed_afterwards(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.prompts = {"one": "a gradient"}
    workplace.config |= DRAWN | {"learning_rate": 1e-3, "max_train_steps": 1, "use_ema": True, "ema_decay": 0.5}
    assert workplace.train() == 0
    validations = workplace.run().root / "validation"
    assert [event["step"] for event in workplace.events("validation")] == [0, 1]
    base = validations / "step-000000" / "one_64x48_0.png"
    assert base.is_file()
    assert (validations / "step-000001" / "ema" / base.name).is_file()
    base.unlink()
    capsys.readouterr()
    assert workplace.train("--max_train_steps=2") == 0
    assert "The base model's validation images are missing" in capsys.readouterr().out
    assert not base.exists()
    assert (validations / "step-000002" / "sheet.png").is_file()


@pytest.mark.slow
def test_the_average_is_measured_beside_the_model(workplace: Workplace) -> None:
    workplace.datasets.append(PICTURES | {"id": "held", "dataset_type": "eval", "cache_dir_vae": "cache/held"})
    workplace.config |= {"mixed_precision": "bf16", "use_ema": True, "ema_decay": 0.9, "num_eval_images": 1}
    assert workplace.train("--output_dir=output/looked") == 0
    measured = workplace.events("validation", "looked")
    assert measured[0]["ema_loss"] == measured[0]["loss"]
    assert measured[-1]["ema_loss"] != measured[-1]["loss"]
    assert workplace.train("--ema_validation=none", "--eval_steps_interval=100") == 0  # looking changed no bit
    found, again = weights(workplace), weights(workplace, "looked")
    assert all(tensor.equal(again[name]) for name, tensor in found.items())


@pytest.mark.slow
def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = 20 * 2**20
    monkeypatch.setattr(machine, "free_disk_bytes", lambda path: free)
    assert workplace.train("--disk_low_threshold=1MB") == 7
    told = capsys.readouterr().err
    assert "a checkpoint takes about 65.0 MiB and the finished model's single file 21.7 MiB, but only 20.0 MiB" in told
    assert workplace.events("step") == []
    free = 100 * 2**20
    assert workplace.train("--disk_low_threshold=1MB") == 0
    assert "output/run will hold 3 more checkpoints of about 65.0 MiB each" in capsys.readouterr().out


@pytest.mark.slow
def test_rollouts_and_strata_train_the_whole_model_too(workplace: Workplace) -> None:
    workplace.config |= {"scheduled_sampling_max_step_offset": 20, "timestep_strata": True, "max_train_steps": 1}
    assert workplace.train() == 0
    assert workplace.events("step")[0]["rollout_calls"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler alone takes minutes on one thread
@pytest.mark.usefixtures("inductor_cache")
def test_compiled_blocks_learn_the_same(workplace: Workplace) -> None:
    """To 1e-4: the compiler fuses operations, so they round elsewhere."""
    for name, backend in (("eager", "no"), ("compiled", "inductor")):
        done = workplace.train_apart(f"--dynamo_backend={backend}", f"--output_dir=output/{name}")
        assert done.returncode == 0, done.stderr
    assert workplace.losses("compiled") == pytest.approx(workplace.losses("eager"), rel=1e-4)


def test_a_lora_run_does_not_go_on_as_a_full_one(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workplace.train("--max_train_steps=1", "--model_type=lora") == 0
    assert workplace.train("--max_train_steps=2") == 6
    assert "trained with other settings: model_type" in capsys.readouterr().err


@pytest.mark.slow
def test_damaged_weights_are_passed_over(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workplace.train("--max_train_steps=2") == 0
    victim = workplace.run().checkpoint(2) / "transformer" / WEIGHTS
    damaged = victim.read_bytes()[:-1] + b"\0\0"
    victim.unlink()  # the finished model is the same file
    victim.write_bytes(damaged)
    assert workplace.train() == 0
    assert f"step-000002 is damaged and skipped: transformer/{WEIGHTS} does not" in capsys.readouterr().out
    assert workplace.train("--output_dir=output/straight") == 0
    assert trained_bytes(workplace, "run") == trained_bytes(workplace, "straight")
