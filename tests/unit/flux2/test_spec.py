import hashlib

import pytest
import torch

from simpletuner.flux2.spec import DEV, FLAVOURS, SYSTEM_MESSAGE, TransformerSpec

KLEIN_9B = TransformerSpec(
    heads=32, head_dim=128, double_blocks=8, single_blocks=24, context_dim=12288, guidance_embeds=False
)
KLEIN_4B = TransformerSpec(
    heads=24, head_dim=128, double_blocks=5, single_blocks=20, context_dim=7680, guidance_embeds=False
)


def test_system_message_is_the_reference_one():
    assert len(SYSTEM_MESSAGE) == 168
    assert SYSTEM_MESSAGE.count("\n") == 1
    assert hashlib.sha256(SYSTEM_MESSAGE.encode()).hexdigest().startswith("d43d93082f24034d")


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
    assert TransformerSpec.from_tensors(shapes) == spec


def test_an_empty_diffusers_config_is_dev():
    assert TransformerSpec.from_diffusers({}) == DEV


@pytest.mark.parametrize("spec", [DEV, KLEIN_9B, KLEIN_4B])
def test_diffusers_config_round_trip(spec):
    assert TransformerSpec.from_diffusers(spec.to_diffusers()) == spec


def test_axes_must_fill_a_head():
    with pytest.raises(ValueError, match="add up to 128, not to head_dim 64"):
        TransformerSpec.from_diffusers({"attention_head_dim": 64})


def test_another_patch_size_is_refused():
    with pytest.raises(ValueError, match="patch_size"):
        TransformerSpec.from_diffusers({"patch_size": 2})


def test_flavours_are_keyed_by_their_names():
    assert all(flavour.name == key for key, flavour in FLAVOURS.items())
    assert FLAVOURS["dev"].text_layers == (10, 20, 30)
