"""BFL's names of a VAE's tensors: all of them, those of a small decoder too, and no others."""

import math

import pytest
import torch
from tests.single_files import bfl_vae

from simpletuner.flux2.vae_names import vae_renaming


def renamed_back(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `vae_renaming` makes of `tensors`; the shapes that it foretells are checked."""
    renaming, found = vae_renaming(tensors), {}
    for name, tensor in tensors.items():
        renamed = renaming(name)
        assert renamed is not None, name
        ((part, shape),) = zip(renamed.split(tensor), renamed.shapes(tuple(tensor.shape)), strict=True)
        assert tuple(part.shape) == shape
        found[renamed.names[0]] = part
    return found


@pytest.mark.parametrize("decoder", [None, (96, 192, 384, 384)])
def test_the_published_file_holds_every_tensor_of_diffusers_vae(decoder):
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        expected = AutoencoderKLFlux2(decoder_block_out_channels=decoder).state_dict()
    expected = {name: torch.empty(tensor.shape, device="meta") for name, tensor in expected.items()}
    bfl = bfl_vae(expected)
    assert len(bfl) == len(expected) - 1 == 250, "all but the count of batches"
    found = renamed_back(bfl)
    del expected["bn.num_batches_tracked"]
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


def test_every_number_stays_where_it_is(tiny_folder):
    from tests.single_files import component_tensors

    tensors = component_tensors(tiny_folder, "vae")
    found = renamed_back(bfl_vae(tensors))
    assert found.keys() == tensors.keys() - {"bn.num_batches_tracked"}
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    largest = max(found, key=lambda name: math.prod(found[name].shape))
    assert found[largest].dim() == 4, "convolutions keep their four dimensions"
    assert renamed_back(tensors).keys() == tensors.keys(), "diffusers' names stay as they are"


@pytest.mark.parametrize(
    "name",
    [
        "encoder.down.0.attn.0.q.weight",
        "encoder.mid.attn_1.x.weight",
        "decoder.mid.block_3.conv1.weight",
        "decoder.up.0.block.0.temb_proj.weight",
        "encoder.conv_in.scale_weight",
        "decoder.quant_conv.weight",
        "loss.logvar",
    ],
)
def test_what_flux2s_vae_does_not_have_is_unknown(name):
    assert vae_renaming(["decoder.up.3.block.0.conv1.weight"])(name) is None


def test_diffusers_own_conversion_agrees(tiny_folder):
    """It knows latent diffusion's VAEs, whose projections around the latents lie outside the two halves."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from tests.single_files import component_tensors

    bfl = {name: tensor for name, tensor in bfl_vae(component_tensors(tiny_folder, "vae")).items() if name[:3] != "bn."}
    outside = {
        name.replace("encoder.quant", "quant").replace("decoder.post_quant", "post_quant"): tensor
        for name, tensor in bfl.items()
    }
    config = {"down_block_types": [""] * 4, "up_block_types": [""] * 4, "layers_per_block": 1}
    expected, found = convert_ldm_vae_checkpoint(outside, config), renamed_back(bfl)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
