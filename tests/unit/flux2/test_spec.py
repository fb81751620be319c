from dataclasses import replace

import pytest
import torch

from simpletuner.config.flavours import DEV, FLAVOURS, KLEIN_4B, KLEIN_9B, AutoencoderSpec
from simpletuner.flux2.spec import (
    autoencoder_from_config,
    autoencoder_from_tensors,
    autoencoder_to_config,
    text_from_config,
    text_from_tensors,
    text_shapes,
    text_to_config,
    transformer_from_diffusers,
    transformer_from_tensors,
    transformer_to_diffusers,
)
from simpletuner.flux2.tiny.klein import KLEIN_TEXT_CONFIG
from simpletuner.flux2.tiny.make import TEXT_CONFIG
from simpletuner.flux2.tiny.parts import VAE


@pytest.mark.parametrize(
    ("spec", "parameters", "tensors"),
    [(DEV, 32_223_281_152, 331), (KLEIN_9B, 9_078_581_248, 233), (KLEIN_4B, 3_875_544_576, 169)],
)
def test_parameter_counts(spec, parameters, tensors):
    from simpletuner.flux2.transformer import Flux2Transformer

    with torch.device("meta"):
        model = Flux2Transformer(spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(tensor.numel() for tensor in model.parameters()) == parameters
    assert len(shapes) == tensors
    assert transformer_from_tensors(shapes) == spec


def test_an_empty_diffusers_config_is_dev():
    assert transformer_from_diffusers({}) == DEV


@pytest.mark.parametrize("spec", [DEV, KLEIN_9B, KLEIN_4B])
def test_diffusers_config_round_trip(spec):
    assert transformer_from_diffusers(transformer_to_diffusers(spec)) == spec


def test_the_embedded_models_configs_are_the_tables():
    flavour = FLAVOURS["tiny"]
    assert text_from_config(TEXT_CONFIG) == flavour.text.encoder
    assert autoencoder_from_config(VAE) == flavour.autoencoder


def test_another_patch_size_is_refused():
    with pytest.raises(ValueError, match="patch_size"):
        transformer_from_diffusers({"patch_size": 2})


@pytest.mark.parametrize("name", ["dev", "klein-9b", "klein-4b", "tiny", "tiny-klein"])
def test_a_text_encoders_shapes_tell_its_config(name):
    from transformers import AutoConfig, AutoModel

    spec, other = FLAVOURS[name].text.encoder, FLAVOURS["dev"].text.encoder
    config = text_to_config(spec, 2)
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**config))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert text_shapes(spec, 2) | {"norm.weight": (spec.hidden,)} == shapes
    assert text_from_tensors(shapes, other) == text_from_config(config) == spec
    published = KLEIN_TEXT_CONFIG if spec.has_head_norms else TEXT_CONFIG
    theta = published.get("rope_theta") or published["rope_parameters"]["rope_theta"]
    assert model.config.rope_parameters["rope_theta"] == theta
    assert model.config.rms_norm_eps == published["rms_norm_eps"]
    assert model.config.sliding_window is None


def test_an_unknown_text_encoder_has_the_flavours_head_width():
    spec = replace(FLAVOURS["dev"].text.encoder, vocabulary=100)
    assert text_from_tensors(text_shapes(spec, 1), spec) == spec


@pytest.mark.parametrize("decoder", [None, (96, 192, 384, 384)])
def test_a_vaes_shapes_tell_its_config(decoder):
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        vae = AutoencoderKLFlux2(decoder_block_out_channels=decoder)
    shapes = {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()}
    spec = AutoencoderSpec(decoder_channels=decoder)
    assert autoencoder_from_tensors(shapes, FLAVOURS["tiny"].autoencoder) == spec
    config = autoencoder_to_config(spec)
    assert autoencoder_from_config(config) == spec
    for key, value in config.items():
        usual = vae.config.get(key, "AutoencoderKLFlux2")
        assert value == (list(usual) if isinstance(usual, tuple) else usual), key
