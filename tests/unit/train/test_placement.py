"""FLUX.2 with its blocks streamed: the bits of the resident one, whatever comes and goes at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.components import landing, open_autoencoder
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.load import load_autoencoder, load_transformer
from simpletuner.flux2.lora import Adapter, attach
from simpletuner.flux2.routes import Route
from simpletuner.flux2.source import Source, locate
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import recompute
from simpletuner.train.placement import open_decoder, stream_blocks

CPU = torch.device("cpu")


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
    options = OffloadOptions(group_offload_type="leaf_level", group_offload_use_stream=True)
    transformer, _ = adapted(tiny)
    before = dict(transformer.named_parameters())
    assert stream_blocks(transformer, options, torch.device("meta")) is None
    assert landing(options, torch.device("meta")) == torch.device("meta")
    assert not any("forward" in vars(module) for module in transformer.modules())
    assert all(parameter is before[name] for name, parameter in transformer.named_parameters())


@pytest.mark.parametrize("keep_every", [False, None, 3])
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
    assert landing(options, torch.device("meta")) == CPU
    transformer, adapter = adapted(tiny)
    streaming = stream_blocks(transformer, options, CPU)
    if keep_every is not False:
        inputs = None if keep_every else recompute.HostInputs(CPU)
        recompute.install(transformer.blocks, keep_every, inputs=inputs)
    assert same(results(transformer, adapter), resident)
    assert streaming is not None
    assert streaming.peak_resident == 1


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
    assert ("once" in decoder().__name__) == during_startup
