import pytest
import torch

from simpletuner.config.flavours import DEV, FLAVOURS, KLEIN_4B, KLEIN_9B
from simpletuner.flux2.spec import (
    autoencoder_from_config,
    text_from_config,
    transformer_from_diffusers,
    transformer_from_tensors,
    transformer_to_diffusers,
)
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
