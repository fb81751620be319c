"""Names of optimisers, and what is said of them before torch is there."""

from typing import Any

import pytest

from simpletuner.config import optimisers
from simpletuner.config.optimisers import OPTIMISERS, OPTIMIZER_ALIASES, canonical
from simpletuner.config.values import join_names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lion", "lion"),
        ("torch-adamw", "adamw"),
        ("ao-adamw8bit", "adamw8bit"),
        ("bnb-adamw8bit", "adamw8bit"),
        ("optimi-lion", "lion"),
        ("bnb-lion8bit-paged", "bitsandbytes:pagedlion8bit"),
        ("torch:AdamW", "adamw"),
        ("torch:NAdam", "torch:nadam"),
        ("bnb:Lion8bit", "bitsandbytes:lion8bit"),
        ("pytorch-optimizer:Adan", "pytorch_optimizer:adan"),
        ("somewhere:Adan", None),
        ("torch:", None),
        ("sgdd", None),
    ],
)
def test_one_name_for_what_is_meant(typed: str, meant: str | None) -> None:
    assert canonical(typed) == meant


def test_every_alias_leads_somewhere() -> None:
    for name in OPTIMIZER_ALIASES.values():
        assert canonical(name) == name


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("ao-adamw4bit", "The nearest is ao-adamw8bit."),
        ("adamw_schedulefree+aggressive", "The nearest is adamw_schedulefree."),
        ("prodgy", "Did you mean prodigy?"),
    ],
)
def test_a_name_that_is_not_there_gets_the_nearest(place: Any, typed: str, near: str) -> None:
    place.config["optimizer"] = typed
    (problem,) = place.problems()
    assert problem.startswith(f"optimizer = {typed!r}: expected adamw, adamw_bf16, ")
    assert problem.endswith(near)


def test_a_library_that_is_missing_is_named_with_the_remedy(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisers, "find_spec", lambda name: None)
    place.config["optimizer"] = "lion"
    assert place.problems() == [
        "optimizer = 'lion': pytorch_optimizer is not installed. pip install -e '.[optimizers]'"
    ]
    place.config["optimizer"] = "torch:nadam"
    place.load()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_it_does_not_read_is_said(place: Any, name: str) -> None:
    place.config |= {"optimizer": name, "optimizer_beta2": 0.9, "adam_epsilon": 1e-7, "adam_weight_decay": 0.1}
    said = [text for text in place.load().notices if "no effect" in text]
    ignored = [
        key for key in ("optimizer_beta2", "adam_epsilon", "adam_weight_decay") if key not in OPTIMISERS[name].reads
    ]
    assert [text.split(" ha")[0] for text in said] == ([join_names(ignored, "and")] if ignored else [])


def test_one_of_a_library_has_its_arguments_in_optimizer_config_alone(place: Any) -> None:
    place.config |= {"optimizer": "torch:nadam", "adam_weight_decay": 0.1, "optimizer_config": {"betas": [0.9, 0.95]}}
    loaded = place.load()
    assert "adam_weight_decay has no effect: torch:nadam takes its own in optimizer_config." in loaded.notices
    assert loaded.config.optimizer_config == {"betas": (0.9, 0.95)}


def test_prodigy_has_one_rate_and_wants_it_near_one(place: Any) -> None:
    place.config |= {"optimizer": "prodigy", "lora_plus_ratio": 4}
    assert place.problems() == [
        "lora_plus_ratio = 4 with prodigy, which finds one rate for all: expected 1, or another optimizer."
    ]
    place.config["lora_plus_ratio"] = 1.0
    assert any("multiplies the rate that prodigy finds" in text for text in place.load().notices)
    place.config["learning_rate"] = 1.0
    assert not any("prodigy" in text for text in place.load().notices)


def test_a_scaled_rate_is_said_and_bounded(place: Any) -> None:
    place.config |= {"lr_scale": True, "train_batch_size": 4, "learning_rate": 1e-4}
    assert "learning_rate 0.0001 × 4 by the effective batch of 4: 0.0004." in place.load().notices
    place.config["learning_rate"] = 0.5
    assert "learning_rate = 0.5, 2 scaled by the effective batch: expected at most 1" in place.problems()[0]


def test_schedule_free_and_a_falling_rate_get_a_word(place: Any) -> None:
    place.config |= {"optimizer": "adamw_schedulefree", "lr_scheduler": "cosine"}
    assert any("averages in place of a falling rate" in text for text in place.load().notices)


def test_options_of_an_average_that_is_not_kept_have_no_effect(place: Any) -> None:
    place.config["ema_decay"] = 0.9
    assert "ema_decay has no effect: use_ema is false." in place.load().notices
