"""Peak memory on the GPU against the memory plan. A rehearsal runs the same on small shapes and compares nothing."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import run_command
from PIL import Image
from tiny_training import RATE, adapted, fill_randomly, global_batch, stepper

from simpletuner.base.sizes import GIB
from simpletuner.config.flavours import (
    KLEIN_9B,
    TINY,
    TINY_AUTOENCODER,
    TINY_TEXT,
    AutoencoderSpec,
    TextSpec,
    TransformerSpec,
)
from simpletuner.config.options.precision import PrecisionName
from simpletuner.config.run import RunConfig
from simpletuner.flux2.footprint import Architecture, Footprint, Workload
from simpletuner.flux2.spec import transformer_to_diffusers
from simpletuner.flux2.tokens import PIXELS_PER_TOKEN
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import offload, recompute
from simpletuner.memory.planner import MachineMemory
from simpletuner.memory.precision import quantizable_linears, replace_by_empty
from simpletuner.memory.tensors import save_tensors
from simpletuner.runs.events import read_events

SHARE = 0.05
"""What cuBLAS's workspace and the allocator's rounding add to a plan of tensors, at most, at these sizes."""

MIDDLE = replace(KLEIN_9B, heads=16, double_blocks=4, single_blocks=12, guidance_embeds=True, context_dim=3 * 2048)
"""1.1 billion parameters: small enough to be made in seconds, large enough that fixed costs hardly count."""
EDGE = {"cuda": 1024, "cpu": 64}
TEXT = {"cuda": 512, "cpu": 32}
ROOMY = MachineMemory(accelerator=2**50, ram=2**50, disk=None)


@dataclass(frozen=True)
class Held:
    """How the base weights and the inputs of recomputed blocks are held."""

    precision: PrecisionName = "no_change"
    is_streamed: bool = False
    ahead: bool = False
    has_host_inputs: bool = False


CASES = {
    "resident": Held(),
    "int8": Held("int8-quanto"),
    "int4": Held("int4-quanto"),
    "streamed": Held(is_streamed=True),
    "streamed ahead": Held(is_streamed=True, ahead=True),
    "streamed ahead, host inputs": Held(is_streamed=True, ahead=True, has_host_inputs=True),
    "streamed int4": Held("int4-quanto", is_streamed=True),
}


@pytest.mark.parametrize("case", CASES)
def test_training_peaks_where_it_is_planned(device: torch.device, case: str) -> None:
    held = CASES[case]
    spec = MIDDLE if device.type == "cuda" else TINY
    edge, text = EDGE[device.type], TEXT[device.type]
    before = allocated(device)
    model = middle_model(spec, held, device)
    adapter = adapted(model, rank=16)
    if held.is_streamed:
        offload.install(model, offload.block_groups(model.blocks), device=device, ahead=held.ahead)
    inputs = recompute.HostInputs(device, ahead=held.ahead) if held.has_host_inputs else None
    recompute.install(model.blocks, inputs=inputs)
    trained = stepper(model, adapter, device)
    side = edge // PIXELS_PER_TOKEN

    def step(number: int) -> None:
        trained(global_batch(number, samples=1, grid=(side, side), text=text, context_dim=spec.context_dim), RATE)

    step(1)
    step(2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step(3)
    expected = planned(spec, held, edge, text)
    if device.type == "cuda":
        found = torch.cuda.max_memory_allocated(device) - before
        assert abs(found / expected - 1) <= SHARE, f"peak {found / GIB:.3f} GiB, planned {expected / GIB:.3f} GiB"


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def middle_model(spec: TransformerSpec, held: Held, device: torch.device) -> Flux2Transformer:
    """Random weights, made on `device` block by block; where they are to be streamed, blocks stay on the CPU."""
    with torch.device("meta"):
        model = Flux2Transformer(spec).bfloat16().requires_grad_(False)
        if held.precision != "no_change":
            within = ("transformer_blocks.", "single_transformer_blocks.")
            replace_by_empty(model, quantizable_linears(model, within, held.precision), held.precision, torch.bfloat16)
    blocks = set(model.blocks)
    others = [child for child in model.children() if not isinstance(child, torch.nn.ModuleList)]
    for part in (*model.blocks, *others):
        part.to_empty(device=device)
        fill_randomly(part, held.precision, 0.02)
        if part in blocks and held.is_streamed:
            part.to("cpu")
    return model


def planned(spec: TransformerSpec, held: Held, edge: int, text: int) -> int:
    """Bytes of the accelerator that `simpletuner plan` expects of training without images."""
    options: dict[str, Any] = {
        "base_model_precision": held.precision,
        "enable_group_offload": held.is_streamed,
        "group_offload_use_stream": held.ahead,
        "group_offload_resident_blocks": 0,
        "activation_offload": held.has_host_inputs,
        "tokenizer_max_length": text,
        "lora_rank": 16,
        "flux_lora_target": "all",
    }
    # A release without partial residency keeps no block resident anyway.
    config = RunConfig.model_validate({name: options[name] for name in options.keys() & RunConfig.model_fields.keys()})
    architecture = replace(Architecture.of(config), transformer=spec)
    work = Workload(bucket=(edge, edge), batch=1, samples_images=False)
    return Footprint(config, architecture, work, ROOMY).train().total("accelerator")


# Whole runs

MIDDLE_TEXT = TextSpec(TINY_TEXT.vocabulary, hidden=2048, inner=5632, heads=16, key_heads=4, head_dim=128)
"""With 30 layers, 1.4 billion parameters."""


def make_middle_pipeline(folder: Path, embedded: Path, device: torch.device) -> None:
    """The embedded model's folder with components of random weights in it: large ones, in a rehearsal small ones."""
    is_cuda = device.type == "cuda"
    shutil.copytree(embedded, folder)
    transformer = middle_model(MIDDLE if is_cuda else TINY, Held(), device)
    config = transformer_to_diffusers(transformer.spec)
    replace_component(folder / "transformer", "diffusion_pytorch_model", config, transformer.state_dict())
    replace_text_encoder(folder / "text_encoder", MIDDLE_TEXT if is_cuda else TINY_TEXT)
    replace_autoencoder(folder / "vae", AutoencoderSpec() if is_cuda else TINY_AUTOENCODER)


def replace_text_encoder(folder: Path, text: TextSpec) -> None:
    """A Mistral-3 without a vision part."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": text.hidden,
        "intermediate_size": text.inner,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.key_heads,
        "head_dim": text.head_dim,
    }
    language = config["text_config"]
    ends = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    shapes = {"embed_tokens": (language["vocab_size"], text.hidden)}
    for index in range(language["num_hidden_layers"]):
        shapes |= {f"layers.{index}.{end}_proj": shape for end, shape in zip(ends, text.linears, strict=True)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{index}.{norm}"] = (text.hidden,)  # type: ignore[assignment]
    tensors = {
        f"language_model.model.{name}.weight": torch.full(shape, 1.0, dtype=torch.bfloat16)
        if len(shape) == 1
        else 0.02 * torch.randn(shape, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    replace_component(folder, "model", config, tensors)


def replace_autoencoder(folder: Path, autoencoder: AutoencoderSpec) -> None:
    from diffusers import AutoencoderKLFlux2

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config |= {
        "block_out_channels": list(autoencoder.channels),
        "layers_per_block": autoencoder.blocks_per_level,
        "norm_num_groups": min(32, autoencoder.channels[0] // 8),
        "sample_size": autoencoder.tile,
    }
    weights = AutoencoderKLFlux2.from_config(config).state_dict()
    replace_component(folder, "diffusion_pytorch_model", config, weights)


def replace_component(folder: Path, stem: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    on_cpu = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_tensors(folder / f"{stem}.safetensors", on_cpu, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_each_phase_of_a_run_peaks_where_it_is_planned(
    device: torch.device, embedded_model: Path, tmp_path: Path, streamed: bool
) -> None:
    """The run's own events: the plan's phases, and the peak of each phase. 5 GiB are written to the disk."""
    pytest.importorskip("diffusers", reason="the autoencoder is diffusers'")
    model = tmp_path / "model"
    make_middle_pipeline(model, embedded_model, device)
    edge = EDGE[device.type]
    write_workplace(tmp_path, edge, streamed)
    done = run_command(tmp_path, "train", f"--pretrained_model_name_or_path={model}")
    assert done.returncode == 0, done.stderr[-4000:]
    events = list(read_events(tmp_path / "output" / "run" / "events.jsonl"))
    plans = [event["plan"] for event in events if event["type"] == "plan"]
    expected = {phase["phase"]: phase["accelerator"] / GIB for phase in plans[-1]["phases"]}
    ends = [event for event in events if event["type"] == "phase" and event["state"] == "end"]
    assert expected.keys() <= {event["phase"] for event in ends}
    if device.type == "cuda":
        found = {
            name: max(event["memory_allocated_gib"] for event in ends if event["phase"] == name) for name in expected
        }
        wrong = {
            name: (found[name], expected[name]) for name in expected if abs(found[name] / expected[name] - 1) > SHARE
        }
        assert not wrong, f"GiB measured and planned: {wrong}"


def write_workplace(folder: Path, edge: int, streamed: bool) -> None:
    """A run of three steps on three images, with validation images after each: so the decoder is there in training."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for index in range(3):
        gradient = Image.linear_gradient("L").rotate(90 * index).resize((edge, edge))
        Image.merge("RGB", (gradient, gradient, gradient)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(f"a gradient, number {index}")
    config: dict[str, Any] = {
        "model_flavour": "tiny",
        "tokenizer_max_length": 512,
        "output_dir": "output/run",
        "data_backend_config": "datasets.json",
        "user_prompt_library": "prompts.json",
        "max_train_steps": 3,
        "lora_rank": 16,
        "text_encoder_batch_size": 4,
        "vae_dtype": "bf16",
        "validation_resolution": f"{edge}x{edge}",
        "validation_num_inference_steps": 2,
        "validation_step_interval": 1,
        "enable_group_offload": streamed,
        "group_offload_use_stream": streamed,
        "activation_offload": streamed,
        "offload_during_startup": streamed,
    }
    sets = [
        {
            "id": "pictures",
            "type": "local",
            "instance_data_dir": "pictures",
            "caption_strategy": "textfile",
            "resolution": edge,
            "resolution_type": "pixel",
            "cache_dir_vae": "cache/vae",
        },
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
    ]
    for name, content in (("config", config), ("datasets", sets), ("prompts", {"one": "a gradient"})):
        (folder / f"{name}.json").write_text(json.dumps(content))
