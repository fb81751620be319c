"""klein against diffusers' Flux2KleinPipeline and transformers' Qwen3, in fp32 with the same weights."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.numerics.test_pipeline_parity import encoded_references, reference_files
from torch import Tensor

from simpletuner.config.flavours import FlavourName
from simpletuner.config.options.model import ModelOptions
from simpletuner.flow.condition import Condition
from simpletuner.flow.loss import flow_loss
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.generate import generate, initial_noise, sample_latents
from simpletuner.flux2.load import load_autoencoder, load_text_encoder, load_transformer, stream_text_encoder
from simpletuner.flux2.source import Source, locate
from simpletuner.flux2.text import ResidentTextEncoder
from simpletuner.flux2.tokens import context_ids, image_ids, pack_latents

LENGTH = 64
PROMPTS = [
    "",
    "a photo of a cat",
    "  spaces and\na line, [IMG] and 2024 ",
    "U\u0308nïcode ☃ with an accent to compose",
    "a painting of a small yellow house beside a river, soft light",
]


def source_of(folder: Path, flavour: FlavourName) -> Source:
    return locate(ModelOptions(model_flavour=flavour, pretrained_model_name_or_path=str(folder)), report=print)


def encoder_of(source: Source, length: int = LENGTH) -> ResidentTextEncoder:
    source = dataclasses.replace(source, text_length=length)
    return load_text_encoder(source, torch.float32, "cpu", fix_regex=False)


def pipeline_of(folder: Path) -> Any:
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def source(tiny_klein_folder: Path) -> Source:
    return source_of(tiny_klein_folder, "tiny-klein")


@pytest.fixture(scope="module")
def encoder(source: Source) -> ResidentTextEncoder:
    return encoder_of(source)


@pytest.fixture(scope="module")
def pipeline(tiny_klein_folder: Path) -> Any:
    return pipeline_of(tiny_klein_folder)


def contexts_of(pipeline: Any, prompts: list[str]) -> Tensor:
    with torch.no_grad():
        context: Tensor = pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)[0]
    return context


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("is_batched", [True, False])
def test_contexts_are_the_pipelines_padding_included(
    encoder: ResidentTextEncoder, pipeline: Any, is_batched: bool
) -> None:
    """Of prompts of different lengths together, and of each alone."""
    batches = [PROMPTS] if is_batched else [[prompt] for prompt in PROMPTS]
    found = torch.cat([context.expanded() for batch in batches for context in encoder.encode(batch)])
    assert_near(found, contexts_of(pipeline, PROMPTS))


def test_streamed_contexts_are_the_bits_of_the_resident_encoder(
    source: Source, encoder: ResidentTextEncoder, tmp_path: Path
) -> None:
    source = dataclasses.replace(source, text_length=LENGTH)
    streamed = stream_text_encoder(source, torch.float32, "cpu", fix_regex=False, folder=tmp_path)
    batches = [PROMPTS[:2], PROMPTS[2:]]
    for batch, contexts in zip(batches, streamed.encode_batches(batches), strict=True):
        for one, two in zip(contexts, encoder.encode(batch), strict=True):
            assert torch.equal(one.expanded(), two.expanded())


def test_padding_rows_differ_from_each_other_and_between_prompts(encoder: ResidentTextEncoder) -> None:
    one, other = (context.expanded()[0] for context in encoder.encode(PROMPTS[:2]))
    padding = one[-20:]
    assert (padding[1:] - padding[:-1]).abs().amax(dim=1).min() > 1e-3
    assert (padding - other[-20:]).abs().amax(dim=1).min() > 1e-2


def test_a_prompt_has_kleins_template_and_only_its_end_is_cut(encoder: ResidentTextEncoder) -> None:
    rendered = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    tokenizer = encoder._tokenizer
    for prompt in PROMPTS[:3]:
        (ids,) = encoder._fitted([prompt])
        assert tokenizer.decode(ids) == rendered.format(prompt)
    assert encoder.lengths([""]) == [12]
    (ids,) = encoder._fitted(["cat " * LENGTH])
    assert len(ids) <= LENGTH
    assert tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert encoder.truncated == ("cat " * LENGTH,)


def test_layers_are_counted_as_transformers_counts_them(tiny_klein_folder: Path, encoder: ResidentTextEncoder) -> None:
    """Against the whole Qwen3ForCausalLM: its theta and its head width come from the config, its head is tied."""
    from transformers import Qwen3ForCausalLM

    whole = Qwen3ForCausalLM.from_pretrained(tiny_klein_folder / "text_encoder", dtype=torch.float32).eval()
    assert whole.config.rope_parameters["rope_theta"] == 1_000_000
    batch = encoder._padded(encoder._fitted([PROMPTS[1]]))
    with torch.no_grad():
        states = whole(batch.ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer] for layer in (9, 18, 27)], dim=-1)
    assert_near(encoder.encode([PROMPTS[1]])[0].expanded(), expected)


@pytest.mark.parametrize("change", [{"rope_theta": 10_000}, {"head_dim": 12}])
def test_what_a_config_says_of_theta_and_heads_counts(
    tiny_klein_folder: Path, tmp_path: Path, encoder: ResidentTextEncoder, change: dict[str, int]
) -> None:
    from simpletuner.base.errors import AccessError

    copy = shutil.copytree(tiny_klein_folder, tmp_path / "klein")
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    if "head_dim" in change:
        with pytest.raises(AccessError, match=r"wrong shape or dtype.*k_proj"):
            encoder_of(source_of(copy, "tiny-klein"))
    else:
        other = encoder_of(source_of(copy, "tiny-klein")).encode([PROMPTS[1]])[0].expanded()
        assert (other - encoder.encode([PROMPTS[1]])[0].expanded()).abs().max() > 1e-2


def test_an_untied_head_is_left_unread(tiny_klein_folder: Path, tmp_path: Path, encoder: ResidentTextEncoder) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(tiny_klein_folder, tmp_path / "klein")
    config, weights = copy / "text_encoder" / "config.json", copy / "text_encoder" / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    tensors = load_file(weights)
    save_file(tensors | {"lm_head.weight": torch.zeros(704, 64, dtype=torch.bfloat16)}, weights, {"format": "pt"})
    other = encoder_of(source_of(copy, "tiny-klein")).encode([PROMPTS[1]])[0]
    assert torch.equal(other.expanded(), encoder.encode([PROMPTS[1]])[0].expanded())


@torch.no_grad()
def test_velocity_and_loss_with_a_cached_context(source: Source, pipeline: Any, encoder: ResidentTextEncoder) -> None:
    denoise = Denoiser(load_transformer(source, torch.float32, "cpu"))
    generator = torch.Generator().manual_seed(4)
    clean, noise = torch.randn(2, 1, 128, 4, 3, generator=generator)
    sigma = torch.tensor([0.35])
    (context,) = encoder.encode([PROMPTS[4]])
    noised = (1 - sigma) * clean + sigma * noise
    expected = pipeline.transformer(
        hidden_states=pack_latents(noised),
        encoder_hidden_states=contexts_of(pipeline, [PROMPTS[4]]),
        timestep=sigma,
        guidance=None,
        img_ids=image_ids(4, 3),
        txt_ids=context_ids(LENGTH),
        return_dict=False,
    )[0]
    condition = Condition.at(context, 1.0)
    assert_near(pack_latents(denoise(noised, sigma, condition)), expected)
    loss = flow_loss(denoise, clean, condition, sigma=sigma, noise=noise)
    assert_near(loss, (expected - pack_latents(noise - clean)).square().mean().reshape(1))


@pytest.mark.parametrize(
    ("width", "height", "steps", "guidance"), [(64, 64, 3, 4.0), (96, 48, 2, 2.5), (64, 64, 2, 1.0)]
)
def test_images_with_true_guidance_are_the_pipelines(
    source: Source, pipeline: Any, encoder: ResidentTextEncoder, width: int, height: int, steps: int, guidance: float
) -> None:
    noise = initial_noise(7, width=width, height=height)
    expected = drawn_by(pipeline, noise, PROMPTS[1], steps=steps, guidance_scale=guidance)
    positive, negative = (Condition.at(context, 1.0) for context in encoder.encode([PROMPTS[1], ""]))
    denoise = Denoiser(load_transformer(source, torch.float32, "cpu"))
    decode = load_autoencoder(source, torch.float32, "cpu").decode
    for both_at_once in (False, True):
        latents = sample_latents(
            denoise,
            noise,
            positive,
            steps=steps,
            real_guidance=guidance,
            negative=negative,
            both_at_once=both_at_once,
        )
        assert_near(decode(latents).clamp(-1, 1) / 2 + 0.5, expected)


def test_images_with_references_in_both_branches_are_the_pipelines(
    tmp_path: Path, source: Source, pipeline: Any, encoder: ResidentTextEncoder
) -> None:
    paths = reference_files(tmp_path, [(64, 80), (75, 64)])
    noise = initial_noise(7, width=64, height=48)
    images = [Image.open(path) for path in paths]
    expected = drawn_by(pipeline, noise, PROMPTS[1], steps=2, guidance_scale=4.0, image=images)
    references = encoded_references(source, paths)
    positive, negative = (Condition.at(context, 1.0, references) for context in encoder.encode([PROMPTS[1], ""]))
    latents = sample_latents(
        Denoiser(load_transformer(source, torch.float32, "cpu")),
        noise,
        positive,
        steps=2,
        real_guidance=4.0,
        negative=negative,
    )
    assert_near(load_autoencoder(source, torch.float32, "cpu").decode(latents).clamp(-1, 1) / 2 + 0.5, expected)


def test_images_of_the_distilled_klein_are_the_pipelines(tiny_klein_distilled_folder: Path) -> None:
    pipeline = pipeline_of(tiny_klein_distilled_folder)
    assert pipeline.config.is_distilled
    source = source_of(tiny_klein_distilled_folder, "tiny-klein-distilled")
    noise = initial_noise(3, width=64, height=48)
    expected = drawn_by(pipeline, noise, PROMPTS[4], steps=source.flavour.steps)
    (context,) = encoder_of(source).encode([PROMPTS[4]])
    (image,) = generate(
        Denoiser(load_transformer(source, torch.float32, "cpu")),
        load_autoencoder(source, torch.float32, "cpu").decode,
        Condition.at(context, 1.0),
        width=64,
        height=48,
        steps=source.flavour.steps,
        seed=3,
    )
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(48, 64, 3)
    assert (levels - (expected[0].permute(1, 2, 0) * 255)).abs().max() <= 0.5 + 0.01


def drawn_by(pipeline: Any, noise: Tensor, prompt: str, *, steps: int, **more: object) -> Tensor:
    images: Tensor = pipeline(
        prompt=prompt,
        latents=noise,
        height=noise.shape[2] * 16,
        width=noise.shape[3] * 16,
        num_inference_steps=steps,
        max_sequence_length=LENGTH,
        output_type="pt",
        **more,
    ).images
    return images
