"""The header fields that other programs show."""

import pytest

from simpletuner.config.flavours import FLAVOURS
from simpletuner.flux2.export import header_of
from simpletuner.flux2.modelspec import MODELSPEC_FIELDS, modelspec, most_common_size


@pytest.mark.parametrize(
    ("flavour", "architecture"),
    [
        ("dev", "Flux.2-dev"),
        ("klein-4b", "Flux.2-klein-4b"),
        ("klein-9b", "Flux.2-klein-9b"),
        ("klein-9b-distilled", "Flux.2-klein-9b"),
    ],
)
def test_the_architecture_is_named_as_musubi_tuner_names_it(flavour: str, architecture: str) -> None:
    base = FLAVOURS[flavour]
    fields = modelspec(base, is_lora=True, resolution=(1024, 768), comment="a note", trigger="ohwx")
    assert fields["modelspec.architecture"] == f"{architecture}/lora"
    assert modelspec(base, is_lora=False, resolution=None)["modelspec.architecture"] == architecture
    assert fields.keys() == MODELSPEC_FIELDS
    assert fields["modelspec.sai_model_spec"] == "1.0.1"
    assert fields["modelspec.resolution"] == "1024x768"
    assert fields["modelspec.trigger_phrase"] == "ohwx"
    assert fields["modelspec.license"] == base.license
    assert header_of(fields) == {"format": "pt", **fields}


def test_what_nobody_said_is_left_out() -> None:
    fields = modelspec(FLAVOURS["dev"], is_lora=True, resolution=None)
    assert fields == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "Flux.2-dev/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
        "modelspec.title": f"LoRA of {FLAVOURS['dev'].title}",
        "modelspec.license": FLAVOURS["dev"].license,
    }
    with pytest.raises(ValueError, match=r"modelspec\.author"):
        header_of({"modelspec.author": "me"})


def test_the_size_is_that_of_most_images() -> None:
    assert most_common_size([{(64, 48): [0, 1]}, {(48, 64): [0, 1], (32, 32): [0, 1, 2]}]) == (32, 32)
    assert most_common_size([{(64, 64): [0], (128, 32): [1, 2]}, {(64, 64): [0]}]) == (128, 32)
    assert most_common_size([{(64, 64): [0], (128, 64): [1]}]) == (128, 64)
    assert most_common_size([]) is None
