"""Which flavour draws the validation images, and what may be named for that."""

import json
from pathlib import Path

import pytest

from simpletuner.config.previews import preview_source, sampling_flavour, with_preview_defaults
from simpletuner.config.rules import findings
from simpletuner.config.run import RunConfig


def config(**options: object) -> RunConfig:
    return RunConfig.model_validate({"model_flavour": "klein-4b", **options})


@pytest.mark.parametrize(
    ("asked", "drawing", "download"),
    [
        (None, "klein-4b", None),
        ("auto", "klein-4b-distilled", "black-forest-labs/FLUX.2-klein-4B"),
        ("klein-4b-distilled", "klein-4b-distilled", "black-forest-labs/FLUX.2-klein-4B"),
        ("black-forest-labs/FLUX.2-klein-4B", "klein-4b-distilled", "black-forest-labs/FLUX.2-klein-4B"),
        ("/models/flux-2-klein-4b.safetensors", "klein-4b-distilled", "/models/flux-2-klein-4b.safetensors"),
        ("/models/flux-2-klein-base-4b.safetensors", "klein-4b", "/models/flux-2-klein-base-4b.safetensors"),
        ("someone/else", "klein-4b", "someone/else"),
    ],
)
def test_a_preview_model_draws_with_its_own_steps_and_guidance(
    asked: str | None, drawing: str, download: str | None
) -> None:
    made = with_preview_defaults(config(validation_preview_model=asked), set())
    assert sampling_flavour(made).name == drawing
    usual = (4, 1.0) if drawing.endswith("distilled") else (50, 4.0)
    assert (made.validation_num_inference_steps, made.validation_guidance) == usual
    assert preview_source(made) == download


def test_a_folder_is_distilled_if_its_model_index_says_so(tmp_path: Path) -> None:
    named = config(validation_preview_model=str(tmp_path))
    assert sampling_flavour(named).name == "klein-4b"
    (tmp_path / "model_index.json").write_text(json.dumps({"is_distilled": True}))
    assert sampling_flavour(named).name == "klein-4b-distilled"


def test_steps_that_are_given_stay() -> None:
    named = config(validation_preview_model="auto", validation_num_inference_steps=8)
    made = with_preview_defaults(named, {"validation_num_inference_steps"})
    assert (made.validation_num_inference_steps, made.validation_guidance) == (8, 1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_flavour": "dev", "validation_preview_model": "auto"}, "dev has no distilled sibling"),
        ({"validation_preview_model": "klein-9b-distilled"}, "a LoRA of klein-4b fits: klein-4b-distilled"),
        ({"validation_preview_model": "auto", "model_type": "full"}, "trains no adapter"),
    ],
)
def test_a_preview_model_that_cannot_be_is_refused(options: dict[str, object], said: str) -> None:
    told = [
        f"{p.found} {p.expected} {p.remedy}" for keys, p in findings(config(**options), None) if "preview" in keys[0]
    ]
    assert len(told) == 1
    assert said in told[0]
