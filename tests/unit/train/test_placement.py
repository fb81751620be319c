"""FLUX.2 with its blocks streamed: the bits of the resident one, whatever comes and goes at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiers import others_slow

from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.precision import PrecisionOptions
from simpletuner.config.run import RunConfig
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.components import load_base, load_device, open_autoencoder
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.footprint import Architecture, Footprint, Workload
from simpletuner.flux2.load import load_autoencoder, load_transformer
from simpletuner.flux2.lora import Adapter, attach
from simpletuner.flux2.residency import resident_indices
from simpletuner.flux2.routes import Route
from simpletuner.flux2.source import Source, locate
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import recompute
from simpletuner.memory.planner import MachineMemory
from simpletuner.train.placement import open_decoder, residency_text, stream_blocks

CPU = torch.device("cpu")
BLOCK = "transformer_blocks.0.attn.to_q.weight"


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Source:
    return locate(ModelOptions(pretrained_model_name_or_path=str(tiny_folder)), report=print)


def adapted(source: Source, dtype: torch.dtype = torch.float32) -> tuple[Flux2Transformer, Adapter]:
    """With an adapter in whole and in parts of matrices that does something, and drops something."""
    transformer = load_transformer(source, dtype, CPU).requires_grad_(False)
    adapter = attach(transformer, LoraOptions(lora_rank=4, flux_lora_target="attention", lora_dropout=0.1), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return transformer.train(), adapter


def results(transformer: Flux2Transformer, adapter: Adapter) -> list[torch.Tensor]:
    """Velocities and gradients of a few passes, one of them routed, with one without gradients in between."""
    torch.manual_seed(0)
    latents, context = torch.randn(2, 128, 4, 6), torch.randn(2, 7, transformer.spec.context_dim)
    given = latents, torch.tensor([0.3, 0.8]), Condition.at(TextContext.dense(context), 1.0)
    denoiser = Denoiser(transformer)
    choices = draw_choices([Route(1, transformer.spec.blocks - 2, 0.5)], 0, 1, [0, 1], 24)
    found = []
    for number in range(2):
        torch.manual_seed(number)
        velocity = denoiser.routed(choices if number else ())(*given)
        with torch.no_grad():
            found.append(denoiser(*given))
        velocity.float().square().mean().backward()
        found.append(velocity.detach())
    return found + [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]


def same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def resident(tiny: Source) -> list[torch.Tensor]:
    return results(*adapted(tiny))


def test_off_nothing_is_touched(tiny: Source) -> None:
    options = OffloadOptions(group_offload_type="leaf_level", group_offload_use_stream="true")
    transformer, _ = adapted(tiny)
    before = dict(transformer.named_parameters())
    assert stream_blocks(transformer, options, torch.device("meta")) is None
    assert load_device(options, tiny.spec, torch.device("meta"))(BLOCK) == torch.device("meta")
    assert not any("forward" in vars(module) for module in transformer.modules())
    assert all(parameter is before[name] for name, parameter in transformer.named_parameters())


@pytest.mark.parametrize("keep_every", [None, *(pytest.param(each, marks=pytest.mark.slow) for each in (False, 3))])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"group_offload_blocks_per_group": 3},
        {"group_offload_type": "leaf_level"},
        {"group_offload_to_disk_path": "blocks"},
    ],
    ids=str,
)
def test_streamed_it_gives_the_resident_ones_bits(
    tiny: Source, resident: list[torch.Tensor], changes: dict[str, Any], keep_every: int | bool | None
) -> None:
    options = OffloadOptions(enable_group_offload=True, **changes)
    assert load_device(options, tiny.spec, torch.device("meta"))(BLOCK) == CPU
    transformer, adapter = adapted(tiny)
    streaming = stream_blocks(transformer, options, CPU)
    if keep_every is not False:
        inputs = None if keep_every else recompute.HostInputs(CPU)
        recompute.install(transformer.blocks, keep_every, inputs=inputs)
    assert same(results(transformer, adapter), resident)
    assert streaming is not None
    assert streaming.peak_resident == 1


WAYS: dict[str, dict[str, Any]] = {
    "block": {},
    "three blocks": {"group_offload_blocks_per_group": 3},
    "leaf": {"group_offload_type": "leaf_level"},
    "disk": {"group_offload_to_disk_path": "blocks"},
}


@pytest.mark.parametrize("count", others_slow((0, 3, 8, 99), 3))
@pytest.mark.parametrize("way", WAYS)
def test_with_resident_blocks_it_gives_the_resident_ones_bits(
    tiny: Source, resident: list[torch.Tensor], way: str, count: int
) -> None:
    options = OffloadOptions.model_validate(
        {"enable_group_offload": True, "group_offload_resident_blocks": count, **WAYS[way]}
    )
    transformer, adapter = adapted(tiny)
    streaming = stream_blocks(transformer, options, CPU)
    touched = [
        any("forward" in vars(module) for module in block.modules()) for block in transformer.blocks
    ]  # resident blocks are not
    assert touched.count(True) == max(0, 8 - count)
    assert [index for index, is_touched in enumerate(touched) if not is_touched] == sorted(
        resident_indices(tiny.spec, count)
    )
    recompute.install(transformer.blocks)
    assert same(results(transformer, adapter), resident)
    assert streaming is not None
    assert streaming.peak_resident == min(1, max(0, 8 - count))


def test_what_stays_is_said_and_also_where_there_are_fewer_blocks(tiny: Source) -> None:
    said = [
        residency_text(OffloadOptions.model_validate({"group_offload_resident_blocks": count}), tiny.spec)
        for count in ("auto", 0, 3, 8, 99)
    ]
    assert said == [
        "",
        "",
        "; 3 of 8 blocks stay resident",
        "; 8 of 8 blocks stay resident",
        "; 8 of 8 blocks stay resident, fewer than group_offload_resident_blocks = 99",
    ]


@pytest.mark.parametrize("count", [0, 3, 8])
@pytest.mark.parametrize("way", WAYS)
def test_residency_takes_what_is_planned(tiny: Source, way: str, count: int) -> None:
    config = RunConfig.model_validate(
        {
            "model_flavour": "tiny",
            "mixed_precision": "no",
            "enable_group_offload": True,
            "group_offload_resident_blocks": count,
            **WAYS[way],
        }
    )
    transformer = load_transformer(tiny, torch.float32, CPU).requires_grad_(False)
    streaming = stream_blocks(transformer, config, CPU)
    assert streaming is not None
    foot = Footprint(config, Architecture.of(config), Workload((64, 64), 1), MachineMemory(None, 2**40, None))
    planned = foot.streamed_blocks(count, ahead=False)
    blocks = [transformer.blocks[index] for index in resident_indices(tiny.spec, count)]
    assert planned.resident == sum(parameter.nbytes for block in blocks for parameter in block.parameters())
    # Each packed tensor is filled up to 256 bytes.
    tensors = sum(1 for _ in transformer.parameters())
    assert planned.streamed <= streaming.packed_bytes <= planned.streamed + 255 * tensors
    assert planned.slots <= streaming.ring_bytes <= planned.slots + 255 * tensors
    buffers = 2 * streaming.slot_bytes if way == "disk" and count < 8 else 0
    assert planned.read_buffers <= buffers <= planned.read_buffers + 2 * 255 * tensors


def test_quantized_with_resident_blocks_and_parts_on_two_devices(tiny: Source) -> None:
    found = []
    for count in (None, 0, 3, 8):
        torch.manual_seed(0)
        offload = OffloadOptions.model_validate(
            {"enable_group_offload": count is not None, "group_offload_resident_blocks": count or 0}
        )
        options = PrecisionOptions(mixed_precision="no", base_model_precision="int8-quanto")
        transformer = load_base(options, offload, tiny, CPU, report=print).requires_grad_(False)
        adapter = attach(transformer, LoraOptions(lora_rank=4, flux_lora_target="all"), seed=0)
        for parameter in adapter.parameters():
            parameter.data.add_(0.05)
        stream_blocks(transformer, offload, CPU)
        recompute.install(transformer.blocks)
        found.append(results(transformer.train(), adapter))
    for other in found[1:]:
        assert same(other, found[0])


def test_only_streamed_blocks_land_in_host_memory(tiny: Source) -> None:
    there = torch.device("meta")
    for count in (0, 3, 8):
        options = OffloadOptions.model_validate({"enable_group_offload": True, "group_offload_resident_blocks": count})
        transformer = load_base(PrecisionOptions(mixed_precision="no"), options, tiny, there, report=print)
        devices = [{parameter.device for parameter in block.parameters()} for block in transformer.blocks]
        stay = resident_indices(tiny.spec, count)
        assert devices == [{there if index in stay else CPU} for index in range(8)]
        assert transformer.proj_out.weight.device == there


def test_in_bf16_too(tiny: Source) -> None:
    expected = results(*adapted(tiny, torch.bfloat16))
    transformer, adapter = adapted(tiny, torch.bfloat16)
    stream_blocks(transformer, OffloadOptions(enable_group_offload=True), CPU)
    recompute.install(transformer.blocks)
    assert same(results(transformer, adapter), expected)


def test_a_streamed_autoencoder_gives_the_resident_ones_bits(tiny: Source) -> None:
    pixels = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for tiling in (False, True):
        model = ModelOptions(vae_dtype="fp32", vae_enable_tiling=tiling)
        plain = load_autoencoder(tiny, torch.float32, CPU, tiling=tiling)
        options = OffloadOptions(group_offload_vae=True)
        encoder = open_autoencoder(model, options, tiny, CPU, "encode")
        latents = encoder.encode(pixels)
        assert torch.equal(latents, plain.encode(pixels))
        decoder = open_autoencoder(model, options, tiny, CPU, "decode")
        assert "forward" in vars(decoder._vae.decoder.conv_in)
        assert torch.equal(decoder.decode(latents), plain.decode(latents))


@pytest.mark.parametrize("during_startup", [False, True])
def test_the_decoder_comes_when_a_picture_is_due(tiny: Source, during_startup: bool) -> None:
    options = OffloadOptions(offload_during_startup=during_startup)
    model = ModelOptions(vae_dtype="fp32")
    decoder = open_decoder(model, options, tiny, CPU)
    latents = torch.randn(1, 128, 2, 2)
    expected = load_autoencoder(tiny, torch.float32, CPU).decode(latents)
    assert torch.equal(decoder()(latents), expected)
    assert torch.equal(decoder()(latents), expected)
    # Kept, it is the decoder of one autoencoder; else it is what loads one.
    assert (decoder() == decoder()) is True
    assert ("free" in decoder().__name__) == during_startup
