"""The embedded model, whole, in the libraries whose models it stands in for."""

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_diffusers_takes_every_tensor(tiny_folder, component):
    import diffusers

    kind = {"transformer": diffusers.Flux2Transformer2DModel, "vae": diffusers.AutoencoderKLFlux2}[component]
    model, found = kind.from_pretrained(tiny_folder / component, output_loading_info=True)
    assert {key: list(names) for key, names in found.items() if names} == {}
    stored = load_file(tiny_folder / component / "diffusion_pytorch_model.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name].to(state[name].dtype)) for name in stored)


def test_transformers_takes_every_tensor(tiny_folder):
    from transformers import Mistral3ForConditionalGeneration

    _, found = Mistral3ForConditionalGeneration.from_pretrained(tiny_folder / "text_encoder", output_loading_info=True)
    assert {key: list(names) for key, names in found.items() if names} == {}


def test_the_pipeline_makes_a_picture(tiny_folder):
    from diffusers import Flux2Pipeline

    pipeline = Flux2Pipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_inference_steps": 2}
        return pipeline(prompt=prompt, generator=generator, output_type="pt", **size).images

    pictures = {prompt: draw(prompt) for prompt in ("a red square", "a blue circle")}
    red, blue = pictures.values()
    assert red.shape == (1, 3, 64, 64)
    assert red.std() > 0.05, "not one gray"
    assert (red - blue).abs().max() > 0.1, "the prompt matters"
