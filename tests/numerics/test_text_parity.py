"""Contexts against those of diffusers' pipeline, in fp32 with the same weights."""

import bisect
import dataclasses

import pytest
import torch

from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.load import load_text_encoder
from simpletuner.flux2.source import locate
from simpletuner.flux2.text import TextEncoder

PROMPTS = [
    "",
    "a photo of a cat",
    "a red square on a white background, [IMG] twice",
    "Ünïcode ☃, 2024,\n\nand a second line",
    "a painting of a small yellow house beside a river, soft morning light, " * 8,
]


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    from diffusers import Flux2Pipeline

    return Flux2Pipeline.from_pretrained(tiny_folder, dtype=torch.float32, local_files_only=True)


@pytest.fixture(scope="module")
def encoder(tiny_folder) -> TextEncoder:
    options = ModelOptions(model_flavour="tiny", pretrained_model_name_or_path=str(tiny_folder))
    source = dataclasses.replace(locate(options, report=print), text_length=512)
    return load_text_encoder(source, torch.float32, "cpu", fix_regex=False)


@pytest.mark.parametrize("batched", [True, False])
def test_context_is_the_pipelines(encoder, pipeline, batched):
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(PROMPTS)
    batches = [PROMPTS] if batched else [[prompt] for prompt in PROMPTS]
    found = torch.cat([encoded.expanded() for batch in batches for encoded in encoder.encode(batch)])
    assert found.shape == expected.shape == (len(PROMPTS), 512, 192)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_padding_row_of_the_pipeline_is_ours(encoder, pipeline):
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt([PROMPTS[1]])
    (encoded,) = encoder.encode([PROMPTS[1]])
    pad = encoded.rows[0]
    padding = expected[0, : 512 - len(encoded.rows) + 1]
    assert (padding - pad).abs().max() <= 1e-5 * expected.abs().max()
    assert pad.abs().max() > 0, "an embedding of zeros would hide a mistake here"


def test_a_full_context_has_no_padding_and_is_the_pipelines(encoder, pipeline):
    words = "cat " * 512
    too_long = bisect.bisect_right(range(len(words)), 512, key=lambda end: len(encoder._tokenize([words[:end]])[0]))
    longest = words[: too_long - 1]
    (encoded,) = encoder.encode([longest])
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt([longest])
    assert len(encoded.rows) == 1 + 512
    assert (encoded.expanded() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_position_ids_of_the_text_are_the_pipelines(pipeline):
    from simpletuner.flux2.tokens import context_ids

    assert torch.equal(context_ids(512), pipeline._prepare_text_ids(torch.zeros(1, 512, 1))[0])
