"""Latents, their layout and their positions against diffusers' pipeline, in fp32 with the same weights."""

import pytest
import torch
from einops import rearrange

from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2 import tokens
from simpletuner.flux2.autoencoder import Autoencoder
from simpletuner.flux2.load import load_autoencoder
from simpletuner.flux2.source import locate


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    from diffusers import Flux2Pipeline

    return Flux2Pipeline.from_pretrained(
        tiny_folder, dtype=torch.float32, text_encoder=None, tokenizer=None, transformer=None
    )


@pytest.fixture(scope="module")
def autoencoder(tiny_folder) -> Autoencoder:
    options = ModelOptions(model_flavour="tiny", pretrained_model_name_or_path=str(tiny_folder))
    return load_autoencoder(locate(options, report=print), torch.float32, "cpu")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_latents_are_the_pipelines(autoencoder, pipeline, pixels):
    with torch.no_grad():
        expected = pipeline._encode_vae_image(pixels, generator=None)
    found = autoencoder.encode(pixels)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_pictures_are_the_pipelines(autoencoder, pipeline, pixels):
    latents = autoencoder.encode(pixels)
    vae = pipeline.vae
    deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    plain = latents * rearrange(deviation, "c -> c 1 1") + rearrange(vae.bn.running_mean, "c -> c 1 1")
    with torch.no_grad():
        expected = vae.decode(pipeline._unpatchify_latents(plain)).sample
    shown = pipeline.image_processor.postprocess(expected, output_type="pt")
    found = (autoencoder.decode(latents) + 1) / 2
    assert (found - shown).abs().max() <= 1e-5


def test_layout_and_positions_are_the_pipelines(pipeline):
    moments = torch.randn(2, 32, 6, 10)
    latents = tokens.patchify(moments)
    assert torch.equal(latents, pipeline._patchify_latents(moments))
    assert torch.equal(tokens.unpatchify(latents), pipeline._unpatchify_latents(latents))
    assert torch.equal(tokens.pack_latents(latents), pipeline._pack_latents(latents))
    positions = pipeline._prepare_latent_ids(latents)
    assert torch.equal(tokens.image_ids(3, 5), positions[0])
    assert torch.equal(
        tokens.unpack_latents(tokens.pack_latents(latents), 3, 5),
        pipeline._unpack_latents_with_ids(tokens.pack_latents(latents), positions),
    )
