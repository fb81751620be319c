"""What is said of quantized weights before torch is there."""

import subprocess
import sys
from typing import Any, get_args

import pytest

from simpletuner.config import precisions
from simpletuner.config.options.precision import PrecisionName
from simpletuner.config.precisions import DISTRIBUTIONS, NO_CHANGE, PRECISIONS


def test_every_value_of_the_option_is_known() -> None:
    assert get_args(PrecisionName) == (NO_CHANGE, *PRECISIONS)
    assert {known.library for known in PRECISIONS.values()} == DISTRIBUTIONS.keys()


@pytest.mark.parametrize("name", PRECISIONS)
def test_each_is_accepted_for_a_lora(place: Any, name: str) -> None:
    place.config |= {"base_model_precision": name, "text_encoder_1_precision": name}
    config = place.load().config
    assert (config.base_model_precision, config.text_encoder_1_precision) == (name, name)


def test_a_name_that_is_none_gets_the_list(place: Any) -> None:
    place.config["base_model_precision"] = "int3-quanto"
    (problem,) = place.problems()
    assert problem.startswith("base_model_precision = 'int3-quanto': expected no_change, int8-quanto, ")


def test_a_library_that_is_missing_or_too_old_is_named(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torchao":
            return "0.9.1"
        raise precisions.PackageNotFoundError

    place.config |= {"base_model_precision": "int8-torchao", "text_encoder_1_precision": "int4-quanto"}
    monkeypatch.setattr(precisions, "version", version)
    assert place.problems() == [
        "base_model_precision = 'int8-torchao': torchao is 0.9.1, and 0.18 or later is needed. "
        "pip install -e '.[quantization]'",
        "text_encoder_1_precision = 'int4-quanto': optimum-quanto is not installed. pip install -e '.[quantization]'",
    ]
    place.config |= {"base_model_precision": "no_change", "text_encoder_1_precision": "no_change"}
    place.load()


def test_a_whole_model_is_not_trained_quantized(place: Any) -> None:
    place.config |= {"model_type": "full", "base_model_precision": "int8-quanto"}
    (problem,) = place.problems()
    assert problem.startswith("base_model_precision = 'int8-quanto' with model_type = full: expected no_change")
    place.config |= {"base_model_precision": "no_change", "text_encoder_1_precision": "int8-quanto"}
    place.load()


def test_what_nothing_reads_without_quantized_weights_is_said(place: Any) -> None:
    place.config |= {"base_model_cache_dir": "kept", "quantize_via": "cpu"}
    notices = place.load().notices
    assert "base_model_cache_dir has no effect: base_model_precision is no_change." in notices
    assert "quantize_via has no effect: nothing is quantized." in notices
    place.config["text_encoder_1_precision"] = "int8-quanto"
    notices = place.load().notices
    assert not any(text.startswith("quantize_via") for text in notices)
    place.config["base_model_precision"] = "int8-quanto"
    assert not any("has no effect" in text for text in place.load().notices)


def test_no_library_is_imported_to_find_it() -> None:
    code = (
        "import sys; from simpletuner.config.precisions import PRECISIONS; "
        "assert all(known.unusable_reason() is None for known in PRECISIONS.values()); "
        "assert not {'torch', 'torchao', 'optimum', 'bitsandbytes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
