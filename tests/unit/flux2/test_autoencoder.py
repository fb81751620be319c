import pytest
import torch

from simpletuner.flux2.autoencoder import Autoencoder
from simpletuner.flux2.load import load_autoencoder
from simpletuner.flux2.tokens import patchify, unpatchify


@pytest.fixture(scope="module")
def autoencoder(tiny_source) -> Autoencoder:
    return load_autoencoder(tiny_source, torch.float32, "cpu")


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_shapes_and_types(autoencoder):
    latents = autoencoder.encode(pictures(2, 3, 64, 96))
    assert latents.shape == (2, 128, 4, 6)
    assert latents.dtype == torch.float32
    pixels = autoencoder.decode(latents)
    assert pixels.shape == (2, 3, 64, 96)
    assert pixels.abs().max() <= 1


def test_latents_are_the_mean_normalized_with_the_eps_of_the_config(autoencoder):
    vae, pixels = autoencoder._vae, pictures(1, 3, 64, 64)
    with torch.no_grad():
        moments = vae.encode(pixels).latent_dist.parameters
    mean = patchify(moments[:, :32])
    variance = vae.bn.running_var[:, None, None] + 1e-4
    expected = (mean - vae.bn.running_mean[:, None, None]) / variance.sqrt()
    assert torch.equal(autoencoder.encode(pixels), expected)


def test_decoding_undoes_the_normalization(autoencoder):
    vae, latents = autoencoder._vae, torch.randn(1, 128, 4, 4)
    plain = latents * (vae.bn.running_var + 1e-4).sqrt()[:, None, None] + vae.bn.running_mean[:, None, None]
    with torch.no_grad():
        expected = vae.decode(unpatchify(plain)).sample.clamp(-1, 1)
    assert torch.equal(autoencoder.decode(latents), expected)


def test_the_statistics_are_not_touched_by_use(autoencoder):
    before = autoencoder._vae.bn.running_mean.clone()
    autoencoder.encode(pictures(4, 3, 32, 32))
    assert torch.equal(autoencoder._vae.bn.running_mean, before)
    assert not autoencoder._vae.training


def test_bf16_weights_give_fp32_latents(autoencoder, tiny_source):
    half = load_autoencoder(tiny_source, torch.bfloat16, "cpu")
    pixels = pictures(1, 3, 64, 64)
    latents = half.encode(pixels)
    assert latents.dtype == torch.float32
    assert half.decode(latents).dtype == torch.float32
    # bf16 keeps 8 bits, over some twenty layers.
    assert (latents - autoencoder.encode(pixels)).abs().mean() < 0.05


def test_tiling_changes_nothing_in_pictures_of_one_tile(autoencoder, tiny_source):
    tiled = load_autoencoder(tiny_source, torch.float32, "cpu", tiling=True)
    small, large = pictures(1, 3, 256, 256), pictures(1, 3, 256, 320)
    assert torch.equal(tiled.encode(small), autoencoder.encode(small))
    assert not torch.equal(tiled.encode(large), autoencoder.encode(large))
    assert tiled.decode(tiled.encode(large)).shape == large.shape


def test_slicing_is_one_picture_at_a_time(autoencoder, tiny_source):
    sliced = load_autoencoder(tiny_source, torch.float32, "cpu", slicing=True)
    pixels = pictures(2, 3, 64, 64)
    alone = torch.cat([autoencoder.encode(pixels[:1]), autoencoder.encode(pixels[1:])])
    assert torch.equal(sliced.encode(pixels), alone)


@pytest.mark.parametrize(("half", "other"), [("encode", "decode"), ("decode", "encode")])
def test_a_half_has_the_bits_of_the_whole_and_no_weights_of_the_other(tiny_source, autoencoder, half, other):
    made = load_autoencoder(tiny_source, torch.float32, "cpu", half=half)
    given = {"encode": torch.rand(1, 3, 32, 48) * 2 - 1, "decode": torch.randn(1, 128, 2, 3)}[half]
    assert torch.equal(getattr(made, half)(given), getattr(autoencoder, half)(given))
    whole = sum(parameter.numel() for parameter in autoencoder._vae.parameters())
    halves = [load_autoencoder(tiny_source, torch.float32, "cpu", half=each) for each in (half, other)]
    assert sum(parameter.numel() for each in halves for parameter in each._vae.parameters()) == whole
