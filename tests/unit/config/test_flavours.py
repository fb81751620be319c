"""The table of flavours, and what is read from it before torch is there."""

import dataclasses
import hashlib
from typing import Any, get_args

import pytest

from simpletuner.config.flavours import DEFAULT_FLAVOUR, FLAVOURS, SYSTEM_MESSAGE, FlavourName, TransformerSpec
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.other_keys import OTHER_OPTIONS
from simpletuner.config.run import RunConfig


def test_flavours_are_keyed_by_their_names() -> None:
    assert tuple(FLAVOURS) == get_args(FlavourName)
    assert all(flavour.name == name for name, flavour in FLAVOURS.items())
    assert "model_flavour" not in OTHER_OPTIONS.values


def test_system_message_is_the_reference_one() -> None:
    assert len(SYSTEM_MESSAGE) == 168
    assert SYSTEM_MESSAGE.count("\n") == 1
    assert hashlib.sha256(SYSTEM_MESSAGE.encode()).hexdigest().startswith("d43d93082f24034d")


def test_axes_must_fill_a_head() -> None:
    with pytest.raises(ValueError, match="add up to 128, not to head_dim 64"):
        TransformerSpec(heads=1, head_dim=64, double_blocks=1, single_blocks=1, context_dim=1, guidance_embeds=False)


@pytest.mark.parametrize("name", FLAVOURS)
def test_a_context_is_as_wide_as_its_layers_together(name: str) -> None:
    flavour = FLAVOURS[name]
    assert flavour.transformer.context_dim == len(flavour.text.layers) * flavour.text.encoder.hidden
    assert flavour.autoencoder.latent_channels * 4 == flavour.transformer.in_channels


def test_the_docs_say_what_the_table_says() -> None:
    texts = ModelOptions.documentation()
    flavours = "; ".join(f"`{name}` is {flavour.summary}" for name, flavour in FLAVOURS.items())
    assert texts["model_flavour"].startswith(flavours)
    default = FLAVOURS[DEFAULT_FLAVOUR].text
    layers = " ".join(texts["custom_text_encoder_intermediary_layers"].split())
    assert "By default the flavour's: 10,20,30 for dev, 9,18,27 for klein" in layers
    assert f"By default the flavour's: {default.length} for dev and klein" in texts["tokenizer_max_length"]
    assert default.layers == (10, 20, 30)
    assert FLAVOURS["klein-9b"].text.layers == FLAVOURS["klein-4b"].text.layers == (9, 18, 27)


def test_dev_and_tiny_have_the_defaults_of_the_options(place: Any) -> None:
    for name in ("dev", "tiny"):
        assert RunConfig(**FLAVOURS[name].option_defaults) == RunConfig(), name
        assert place.load("--model_flavour", name).config.flow_schedule_shift == 3.0


@pytest.mark.parametrize(
    ("name", "steps", "guidance"),
    [("klein-9b", 50, 4.0), ("klein-4b", 50, 4.0), ("klein-9b-distilled", 4, 1.0), ("klein-4b-distilled", 4, 1.0)],
)
def test_klein_draws_as_it_is_published(place: Any, name: str, steps: int, guidance: float) -> None:
    config = place.load("--model_flavour", name).config
    assert (config.validation_num_inference_steps, config.validation_guidance) == (steps, guidance)


@pytest.mark.parametrize("name", FLAVOURS)
def test_distilled_flavours_are_the_siblings_of_their_bases(name: FlavourName) -> None:
    base = FLAVOURS[name]
    if base.preview is None:
        return
    sibling = FLAVOURS[base.preview]
    assert sibling.is_distilled
    assert not base.is_distilled
    assert (sibling.family, sibling.transformer, sibling.text) == (base.family, base.transformer, base.text)
    assert (base.guidance_kind, sibling.guidance_kind) == ("classifier-free", "none")


def test_another_flavour_brings_its_own_defaults(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(FLAVOURS["tiny"], shift=2.0, guidance=1.0, validation_steps=4, license_notice="Ask.")
    monkeypatch.setitem(FLAVOURS, "tiny", other)  # type: ignore[arg-type]
    loaded = place.load()
    config = loaded.config
    found = config.flow_schedule_shift, config.validation_guidance, config.validation_num_inference_steps
    assert found == (2.0, 1.0, 4)
    assert loaded.origins["flow_schedule_shift"] == "default"
    assert "Ask." in loaded.notices
    assert place.load("--flow_schedule_shift=3").config.flow_schedule_shift == 3.0
    assert place.load("--model_flavour=dev").config.flow_schedule_shift == 3.0
