"""Whole pictures against diffusers' Flux2Pipeline: same weights, same noise, same prompt."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiers import others_slow
from torch import Tensor

from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.model import ModelOptions
from simpletuner.data.cache.latents import encode_crop
from simpletuner.data.references import reference_crops
from simpletuner.flow.condition import Condition, References, TextContext
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.export import attach_saved, read_lora, save_lora
from simpletuner.flux2.generate import generate, initial_noise, sample_latents
from simpletuner.flux2.load import load_autoencoder, load_text_encoder, load_transformer
from simpletuner.flux2.lora import attach
from simpletuner.flux2.source import Source, locate
from simpletuner.flux2.tokens import pack_latents, reference_tokens
from simpletuner.runs.layout import LORA_NAME

PROMPT = "a red square on a blue ground"
SIZES = [(64, 64, 1), (96, 48, 4), (32, 160, 7), (128, 128, 20)]


@pytest.fixture(scope="module")
def source(tiny_folder: Path) -> Source:
    return locate(ModelOptions(pretrained_model_name_or_path=str(tiny_folder)), report=print)


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> Any:
    from diffusers import Flux2Pipeline

    pipe = Flux2Pipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def denoise(source: Source) -> Denoiser:
    return Denoiser(load_transformer(source, torch.float32, "cpu"))


@pytest.fixture(scope="module")
def context(denoise: Denoiser) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, 40, denoise.transformer.spec.context_dim, generator=generator)


def asked_of_diffusers(pipe: Any, noise: Tensor, context: Tensor, steps: int, output: str, **more: object) -> Any:
    return pipe(
        prompt_embeds=context,
        latents=noise,
        height=noise.shape[2] * 16,
        width=noise.shape[3] * 16,
        num_inference_steps=steps,
        output_type=output,
        **more,
    ).images


def reference_files(folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """An image of noise of each size."""
    generator = np.random.default_rng(1)
    paths = [folder / f"{index}.png" for index in range(len(sizes))]
    for path, (width, height) in zip(paths, sizes, strict=True):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return paths


def encoded_references(source: Source, paths: list[Path]) -> References:
    """The images at `paths`, as `sample` has them."""
    encode = load_autoencoder(source, torch.float32, "cpu").encode
    return reference_tokens([encode_crop(crop, encode) for crop in reference_crops(map(str, paths)).values()])


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("width", "height", "steps"), SIZES)
@pytest.mark.parametrize("guidance", others_slow([1.0, 4.0], 4.0))
def test_latents(
    pipe: Any, denoise: Denoiser, context: Tensor, width: int, height: int, steps: int, guidance: float
) -> None:
    noise = initial_noise(7, width=width, height=height)
    expected = asked_of_diffusers(pipe, noise, context, steps, "latent", guidance_scale=guidance)
    found = sample_latents(denoise, noise, Condition.at(TextContext.dense(context), guidance), steps=steps)
    assert_near(pack_latents(found), expected)


@pytest.mark.parametrize(
    ("width", "height", "steps"), [*SIZES[:2], *(pytest.param(*each, marks=pytest.mark.slow) for each in SIZES[2:])]
)
def test_pictures(
    pipe: Any, source: Source, denoise: Denoiser, context: Tensor, width: int, height: int, steps: int
) -> None:
    autoencoder = load_autoencoder(source, torch.float32, "cpu")
    noise = initial_noise(7, width=width, height=height)
    (expected,) = asked_of_diffusers(pipe, noise, context, steps, "np", guidance_scale=4.0)
    shown: list[Tensor] = []

    def decode(latents: Tensor) -> Tensor:
        shown.append(autoencoder.decode(latents))
        return shown[0]

    condition = Condition.at(TextContext.dense(context), 4.0)
    (image,) = generate(denoise, decode, condition, width=width, height=height, steps=steps, seed=7)
    assert_near((shown[0][0] / 2 + 0.5).permute(1, 2, 0), torch.from_numpy(expected))
    assert image.size == (width, height)
    # A value just between two levels may round either way.
    assert np.abs(np.asarray(image, np.int16) - (expected * 255).round().astype(np.int16)).max() <= 1


@pytest.mark.parametrize(
    "sizes", [[(64, 96)], [(75, 90), (160, 65)], pytest.param([(1300, 1000)], marks=pytest.mark.slow)], ids=str
)
def test_latents_with_references(
    tmp_path: Path, pipe: Any, source: Source, denoise: Denoiser, context: Tensor, sizes: list[tuple[int, int]]
) -> None:
    """From the files on: sizes that are cut, one that is scaled down, and the size of the output stays its own."""
    paths = reference_files(tmp_path, sizes)
    noise = initial_noise(7, width=96, height=48)
    images = [Image.open(path) for path in paths]
    expected = asked_of_diffusers(pipe, noise, context, 3, "latent", guidance_scale=4.0, image=images)
    references = encoded_references(source, paths)
    condition = Condition.at(TextContext.dense(context), 4.0, references)
    found = sample_latents(denoise, noise, condition, steps=3)
    assert_near(pack_latents(found), expected)
    plain = sample_latents(denoise, noise, Condition.at(TextContext.dense(context), 4.0), steps=3)
    assert (found - plain).abs().max() > 1e-2


def test_from_the_words_on_with_a_lora(tmp_path: Path, pipe: Any, source: Source) -> None:
    transformer = load_transformer(source, torch.float32, "cpu")
    adapter = attach(transformer, LoraOptions(flux_lora_target="attention", lora_alpha=24), seed=1)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_lora(tmp_path / LORA_NAME, adapter, metadata={})

    encoder = load_text_encoder(dataclasses.replace(source, text_length=512), torch.float32, "cpu", fix_regex=False)
    condition = Condition.at(encoder.encode([PROMPT])[0], 4.0)
    fresh = load_transformer(source, torch.float32, "cpu")
    attach_saved(fresh, read_lora(tmp_path))
    noise = initial_noise(7, width=64, height=48)
    found = pack_latents(sample_latents(Denoiser(fresh), noise, condition, steps=4))

    plain = pipe(prompt=PROMPT, latents=noise, height=48, width=64, num_inference_steps=4, output_type="latent")
    pipe.load_lora_weights(tmp_path)
    adapted = pipe(prompt=PROMPT, latents=noise, height=48, width=64, num_inference_steps=4, output_type="latent")
    pipe.unload_lora_weights()
    assert_near(found, adapted.images)
    assert (adapted.images - plain.images).abs().max() > 1e-2
