"""Offloading in whole runs: another place for the weights, the same run."""

import gc
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.recipes.conftest import Workplace
from torch import nn

from simpletuner.cli.main import main

STREAMED = {"enable_group_offload": True, "group_offload_use_stream": True}
ALL = STREAMED | {
    "group_offload_text_encoder": True,
    "group_offload_vae": True,
    "activation_offload": True,
    "offload_during_startup": True,
}
WAYS: dict[str, dict[str, Any]] = {
    "all": ALL,
    "by leaf": STREAMED | {"group_offload_type": "leaf_level"},
    "by three": STREAMED | {"group_offload_blocks_per_group": 3, "gradient_checkpointing_interval": 2},
    "from disk": STREAMED | {"group_offload_to_disk_path": "blocks"},
    "three resident": STREAMED | {"group_offload_resident_blocks": 3, "group_offload_to_disk_path": "blocks"},
    "without recomputing": STREAMED | {"gradient_checkpointing": False},
}


def looked_at(place: Workplace) -> None:
    """Held-out losses and pictures too, TREAD and rollouts."""
    held_out = {"id": "held-out", "dataset_type": "eval", "cache_dir_vae": "cache/eval"}
    place.datasets.insert(0, place.datasets[0] | held_out)
    place.prompts = {"one": "a gradient"}
    route = {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}
    place.config |= {
        "tread_config": {"routes": [route]},
        "scheduled_sampling_max_step_offset": 100,
        "validation_disable": False,
        "validation_step_interval": 2,
        "validation_resolution": "32x32",
        "validation_num_inference_steps": 2,
        "num_eval_images": 2,
        "lora_dropout": 0.1,
        "use_ema": True,
    }


def seen(place: Workplace, name: str) -> dict[str, Any]:
    """All that a run shows: losses, held-out losses, pictures, the LoRA and its average, the optimizer's state."""
    run = place.run(name)
    files = [*run.root.rglob("*.png"), *run.root.rglob("*.safetensors")]
    return {
        "losses": place.losses(name),
        "held out": [event["loss"] for event in place.events("validation", name)],
        **{str(path.relative_to(run.root)): path.read_bytes() for path in files},
    }


@pytest.mark.slow
def test_a_run_with_all_of_it_is_the_run_without(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    looked_at(workplace)
    workplace.config |= {"max_train_steps": 2, "num_eval_images": 1}
    assert workplace.train("--output_dir=output/plain") == 0
    workplace.config |= ALL
    # Caches of its own, so that both encoders run here too.
    workplace.datasets = [
        entry | {key: f"other/{value}" for key, value in entry.items() if key.startswith("cache_dir")}
        for entry in workplace.datasets
    ]
    capsys.readouterr()
    assert workplace.train() == 0
    told = capsys.readouterr().out
    assert "Streamed: 8 groups of weights, " in told
    assert "Note: On a CPU, offloading copies within the same memory" in told
    assert "at most 1 groups on the device" in workplace.run().log.read_text()
    found, expected = seen(workplace, "run"), seen(workplace, "plain")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert sum(name.endswith(".png") for name in found) >= 4


STEPS = 8
LENGTH = {"max_train_steps": STEPS, "checkpoint_step_interval": 4, "validation_step_interval": 4}


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Workplace:
    """A run with all weights where they compute."""
    place = Workplace(tmp_path_factory.mktemp("resident"))
    shutil.copytree(pictures, place.folder / "datasets" / "pictures")
    looked_at(place)
    place.config |= LENGTH
    done = place.train_apart()
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_streamed_steps_have_the_resident_ones_losses_and_lora(
    workplace: Workplace, resident: Workplace, way: str
) -> None:
    looked_at(workplace)
    workplace.config |= LENGTH | WAYS[way]
    assert workplace.train() == 0
    found, expected = seen(workplace, "run"), seen(resident, "run")
    # Whether blocks are recomputed is no part of the bits, but it is of the header's fingerprint.
    if way in ("by three", "without recomputing"):
        lora = "pytorch_lora_weights.safetensors"
        found, expected = ({n: v for n, v in all_.items() if not n.endswith(lora)} for all_ in (found, expected))
    assert len(found["losses"]) == STEPS
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "way"),
    [
        ("int8-quanto", "all"),
        ("int4-quanto", "without recomputing"),
        ("fp8wo-torchao", "by leaf"),
        ("nf4-bnb", "all"),
    ],
)
def test_quantized_weights_stream_with_the_same_bits(workplace: Workplace, precision: str, way: str) -> None:
    workplace.config |= {"max_train_steps": STEPS, "checkpoint_step_interval": STEPS, "mixed_precision": "bf16"}
    workplace.config |= {"base_model_precision": precision, "gradient_checkpointing": way != "without recomputing"}
    assert workplace.train("--output_dir=output/resident") == 0
    workplace.config |= WAYS[way]
    assert workplace.train() == 0
    assert workplace.losses() == workplace.losses("resident")
    assert workplace.run().lora.read_bytes() == workplace.run("resident").lora.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["text:4", "step:1", "checkpoint:2"])
def test_killed_and_started_again_it_ends_the_same(workplace: Workplace, uninterrupted: Workplace, moment: str) -> None:
    """Also where the next start holds the weights otherwise: where they are is no part of a run."""
    flags = [f"--{name}={str(value).lower()}" for name, value in ALL.items() if name != "offload_during_startup"]
    killed = workplace.train_apart(*flags, "--group_offload_to_disk_path=blocks", kill_at=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert workplace.train(*flags, "--group_offload_to_disk_path=blocks", "--max_train_steps=2") == 0
    assert workplace.train() == 0
    assert workplace.run().lora.read_bytes() == uninterrupted.run().lora.read_bytes()
    assert workplace.losses() == uninterrupted.losses()


@pytest.mark.slow
def test_sample_draws_the_same_picture(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--width=32", "--height=48", "--steps=2", "--mixed_precision=no", "--vae_dtype=fp32"]
    common = ["sample", f"--pretrained_model_name_or_path={tiny_folder}", *small, "--prompt", "a fish"]
    ways = [
        [],
        ["--enable_group_offload", "--group_offload_vae", "--group_offload_text_encoder", "--offload_during_startup"],
        [
            "--enable_group_offload",
            "--group_offload_type=leaf_level",
            "--group_offload_resident_blocks=3",
            "--group_offload_to_disk_path=blocks",
        ],
    ]
    pictures = []
    for flags in ways:
        assert main([*common, *flags]) == 0
        pictures.append(Path(capsys.readouterr().out.strip()).read_bytes())
    assert pictures[1] == pictures[0]
    assert pictures[2] == pictures[0]
    assert list(Path("blocks").iterdir())


COMPONENTS = {
    "MistralModel": "MistralModel",
    "Encoder": "AutoencoderKLFlux2",
    "Decoder": "AutoencoderKLFlux2",
    "Flux2Transformer": "Flux2Transformer",
}
"""What computes, and the component that it is of."""


@pytest.fixture
def together() -> Iterator[set[tuple[str, frozenset[str]]]]:
    """What has computed, and which components had weights at that moment. On a CPU there is no other place to look."""
    found: set[tuple[str, frozenset[str]]] = set()

    def look(module: nn.Module, _inputs: object) -> None:
        name = type(module).__name__
        if name in COMPONENTS:
            alive = [thing for thing in gc.get_objects() if type(thing).__name__ in COMPONENTS.values()]
            held = [thing for thing in alive if any(tensor.device.type != "meta" for tensor in thing.parameters())]
            found.add((name, frozenset(type(thing).__name__ for thing in held)))

    gc.collect()
    handle = nn.modules.module.register_module_forward_pre_hook(look)
    yield found
    handle.remove()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"offload_during_startup": True},
        pytest.param(ALL, marks=pytest.mark.slow),
    ],
    ids=["off", "on", "all"],
)
def test_a_phase_holds_what_it_uses(
    workplace: Workplace, together: set[tuple[str, frozenset[str]]], flags: dict[str, Any]
) -> None:
    """One after the other: the text encoder, the autoencoder, the transformer; with pictures the transformer and, while
    it decodes, the autoencoder. Without the flag that stays, ready for the next pictures.
    """
    workplace.prompts = {"one": "a gradient"}
    workplace.config |= flags | {
        "max_train_steps": 2,
        "validation_disable": False,
        "validation_step_interval": 1,
        "validation_resolution": "32x32",
        "validation_num_inference_steps": 1,
    }
    assert workplace.train() == 0
    transformer, both = frozenset({"Flux2Transformer"}), frozenset({"Flux2Transformer", "AutoencoderKLFlux2"})
    expected = {
        ("MistralModel", frozenset({"MistralModel"})),
        ("Encoder", frozenset({"AutoencoderKLFlux2"})),
        ("Flux2Transformer", transformer),
        ("Decoder", both),
    }
    assert together == (expected if flags else expected | {("Flux2Transformer", both)})
