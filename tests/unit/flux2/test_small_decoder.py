"""A VAE with a decoder of other widths, such as FLUX.2-small-decoder: recognized, counted, and the same latents."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.small_decoder import CHANNELS, WEIGHTS, make_small_decoder

from simpletuner.base.errors import AccessError
from simpletuner.config.flavours import AutoencoderSpec
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.run import RunConfig
from simpletuner.flux2.footprint import Architecture
from simpletuner.flux2.load import autoencoder_id, load_autoencoder
from simpletuner.flux2.source import Source, locate
from simpletuner.flux2.spec import decoder_shapes, encoder_shapes

SMALL = AutoencoderSpec(decoder_channels=(96, 192, 384, 384))


@pytest.fixture(scope="module")
def small(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small decoder's folder. Its config does not name the decoder's widths: the tensors tell."""
    folder = tmp_path_factory.mktemp("small") / "small-decoder"
    return make_small_decoder(tiny_folder / "vae", folder, says_so=False)


def with_vae(tiny_folder: Path, vae: Path) -> Source:
    asked = {"pretrained_model_name_or_path": str(tiny_folder), "pretrained_vae_model_name_or_path": str(vae)}
    return locate(ModelOptions(model_flavour="tiny", **asked), report=pytest.fail)


def test_the_published_small_decoder_has_its_parameters() -> None:
    from diffusers import AutoencoderKLFlux2

    counts = [sum(map(math.prod, shapes(SMALL))) for shapes in (encoder_shapes, decoder_shapes)]
    # quant_conv belongs to encoding and post_quant_conv to decoding.
    assert counts == [34_421_696 + 64 * 64 + 64, 27_946_179 + 32 * 32 + 32]
    with torch.device("meta"):
        vae = AutoencoderKLFlux2(decoder_block_out_channels=SMALL.decoder_channels)
    assert sum(parameter.numel() for parameter in vae.parameters()) == sum(counts) == 62_373_091


def test_a_small_decoder_is_recognized_by_its_tensors_and_gives_the_same_latents(
    tiny_source: Source, tiny_folder: Path, small: Path
) -> None:
    source = with_vae(tiny_folder, small)
    assert source.vae.config is not None
    assert source.vae.config["decoder_block_out_channels"] == CHANNELS
    first, second = (load_autoencoder(each, torch.float32, "cpu") for each in (tiny_source, source))
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = second.encode(pixels)
    assert latents.equal(first.encode(pixels))
    images = [autoencoder.decode(latents) for autoencoder in (first, second)]
    assert images[0].shape == images[1].shape
    assert not images[0].equal(images[1])


def test_a_single_file_in_diffusers_names_is_the_same_vae(tiny_folder: Path, small: Path, tmp_path: Path) -> None:
    file = tmp_path / "full_encoder_small_decoder.safetensors"
    file.hardlink_to(small / WEIGHTS)
    source, whole = with_vae(tiny_folder, file), with_vae(tiny_folder, small)
    assert source.vae.config == whole.vae.config
    assert source.fingerprint("vae") == whole.fingerprint("vae")
    with pytest.raises(AccessError, match="no such file"):
        with_vae(tiny_folder, tmp_path / "absent.safetensors")


def test_latents_are_named_by_what_encodes_them(
    tiny_source: Source, tiny_folder: Path, small: Path, repository: Path
) -> None:
    def key(source: Source, dtype: torch.dtype = torch.float32) -> str:
        return autoencoder_id(source, dtype, tiling=False, slicing=False)

    source = with_vae(tiny_folder, small)
    assert key(source) == key(tiny_source)
    assert source.fingerprint("vae") != tiny_source.fingerprint("vae")
    found = [key(tiny_source)]
    weights, config = repository / "vae" / WEIGHTS, repository / "vae" / "config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    for name in ("encoder.conv_in.weight", "quant_conv.bias", "bn.running_mean", "bn.running_var"):
        weights.unlink()
        save_file(tensors | {name: tensors[name] + 1}, weights)
        found.append(key(with_vae(tiny_folder, repository)))
    weights.unlink()
    save_file(tensors, weights)
    config.unlink()
    config.write_text(json.dumps(fields | {"batch_norm_eps": 1e-3}))
    found.append(key(with_vae(tiny_folder, repository)))
    assert len(set(found)) == len(found)
    config.write_text(json.dumps(fields | {"decoder_block_out_channels": None, "batch_norm_momentum": 0.2}))
    assert key(with_vae(tiny_folder, repository)) == found[0], "as diffusers writes the usual one"


def test_the_plan_counts_the_small_decoder(tiny_folder: Path, small: Path, tmp_path: Path) -> None:
    says_so = make_small_decoder(tiny_folder / "vae", tmp_path / "says-so")
    for vae in (says_so, small / WEIGHTS):
        config = RunConfig(model_flavour="tiny", pretrained_vae_model_name_or_path=str(vae))
        assert Architecture.of(config).autoencoder.decoder_channels == tuple(CHANNELS)


def test_an_encoder_in_fp32_and_in_bf16_has_one_name_where_it_runs_in_bf16(tiny_folder: Path, repository: Path) -> None:
    """klein's VAE is published in bf16, the small decoder's repository holds the same encoder in fp32."""
    weights = repository / "vae" / WEIGHTS
    tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
    tensors["encoder.conv_in.weight"][0, 0, 0, 0] += 1e-6  # less than bf16 shows
    sources = []
    for dtype in (torch.float32, torch.bfloat16):
        weights.unlink()
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, weights)
        sources.append(with_vae(tiny_folder, repository))
        for encoded_in in (torch.float32, torch.bfloat16):  # before the file changes
            sources[-1].encoder_fingerprint(encoded_in)
    first, second = sources
    assert first.encoder_fingerprint(torch.bfloat16) == second.encoder_fingerprint(torch.bfloat16)
    assert first.encoder_fingerprint(torch.float32) != second.encoder_fingerprint(torch.float32)
