"""Names of optimizers, and what is said of them before torch is there."""

from typing import Any

import pytest

from simpletuner.config import optimizers
from simpletuner.config.optimizers import OPTIMIZER_ALIASES, OPTIMIZERS, canonical
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
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    place.config["optimizer"] = "lion"
    assert place.problems() == [
        "optimizer = 'lion': pytorch_optimizer is not installed. pip install -e '.[optimizers]'"
    ]
    place.config["optimizer"] = "torch:nadam"
    place.load()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_it_does_not_read_is_said(place: Any, name: str) -> None:
    place.config |= {"optimizer": name, "optimizer_beta2": 0.9, "adam_epsilon": 1e-7, "adam_weight_decay": 0.1}
    said = [text for text in place.load().notices if "no effect" in text]
    ignored = [
        key for key in ("optimizer_beta2", "adam_epsilon", "adam_weight_decay") if key not in OPTIMIZERS[name].reads
    ]
    assert [text.split(" ha")[0] for text in said] == ([join_names(ignored, "and")] if ignored else [])


def test_one_of_a_library_has_its_arguments_in_optimizer_config_alone(place: Any) -> None:
    place.config |= {"optimizer": "torch:nadam", "adam_weight_decay": 0.1, "optimizer_config": {"betas": [0.9, 0.95]}}
    loaded = place.load()
    assert "adam_weight_decay has no effect: torch:nadam takes its arguments in optimizer_config." in loaded.notices
    assert loaded.config.optimizer_config == {"betas": (0.9, 0.95)}


def test_prodigy_has_one_rate_and_wants_it_near_one(place: Any) -> None:
    place.config |= {"optimizer": "prodigy", "lora_plus_ratio": 4}
    assert place.problems() == [
        "lora_plus_ratio = 4 with prodigy, which estimates a single learning rate: expected 1, or another optimizer."
    ]
    place.config["lora_plus_ratio"] = 1.0
    assert any("multiplies the learning rate that prodigy estimates" in text for text in place.load().notices)
    place.config["learning_rate"] = 1.0
    assert not any("prodigy" in text for text in place.load().notices)


@pytest.mark.parametrize(
    ("optimizer", "rate", "says"),
    [
        ("prodigy", 1e-4, "multiplies the learning rate that prodigy estimates: 1 is usual"),
        (
            "pytorch_optimizer:dadaptadam",
            1e-4,
            "multiplies the learning rate that pytorch_optimizer:dadaptadam estimates",
        ),
        ("pytorch_optimizer:prodigy", 1.0, None),
        ("adamw", 3e-3, None),
        ("adamw", 1e-2, "with adamw usually diverges at 0.01 or more. Begin with --learning_rate=0.0001."),
        ("adamw_bf16", 0.5, "usually diverges at 0.01 or more"),
        ("adamw_schedulefree", 1e-2, None),
        ("adamw_schedulefree", 3e-2, "usually diverges at 0.03 or more"),
        ("torch:nadam", 0.02, "usually diverges at 0.01 or more"),
        ("lion", 1e-3, None),
        ("lion", 3e-3, "usually diverges at 0.003 or more. Begin with --learning_rate=3e-05."),
        ("adafactor", 0.05, None),
        ("torch:sgd", 0.5, None),
    ],
)
def test_a_rate_that_learns_nothing_or_diverges_is_said_with_another(
    place: Any, optimizer: str, rate: float, says: str | None
) -> None:
    place.config |= {"optimizer": optimizer, "learning_rate": rate}
    said = [text for text in place.load().notices if "diverges" in text or "multiplies" in text]
    assert [says in text for text in said] == ([] if says is None else [True])
    if said:  # the remedy works
        place.config["learning_rate"] = float(said[0].rstrip(".").rpartition("--learning_rate=")[2])
        assert not [text for text in place.load().notices if "diverges" in text or "multiplies" in text]


def test_a_whole_model_diverges_at_a_tenth_of_the_rate_and_a_scaled_rate_counts(place: Any) -> None:
    place.config |= {"model_type": "full", "learning_rate": 1e-3}
    assert any("training a whole model with adamw usually diverges at 0.001 or more" in n for n in place.load().notices)
    place.config |= {"model_type": "lora", "learning_rate": 3e-3, "lr_scale": True, "train_batch_size": 4}
    said = "learning_rate = 0.003, 0.012 scaled by the effective batch: training a LoRA with adamw usually diverges"
    assert any(text.startswith(said) for text in place.load().notices)


def test_a_self_tuned_rate_above_one_names_one(place: Any) -> None:
    place.config |= {"optimizer": "prodigy", "learning_rate": 3}
    assert place.problems() == ["learning_rate = 3: expected at most 1. Set 1 for prodigy."]


def test_a_scaled_rate_is_said_and_bounded(place: Any) -> None:
    place.config |= {"lr_scale": True, "train_batch_size": 4, "learning_rate": 1e-4}
    assert "learning_rate 0.0001 × 4 for the effective batch of 4: 0.0004." in place.load().notices
    place.config["learning_rate"] = 0.5
    assert "learning_rate = 0.5, 2 scaled by the effective batch: expected at most 1" in place.problems()[0]


def test_schedule_free_and_a_falling_rate_get_a_word(place: Any) -> None:
    place.config |= {"optimizer": "adamw_schedulefree", "lr_scheduler": "cosine"}
    assert any("averages the weights instead of decaying the learning rate" in text for text in place.load().notices)


def test_options_of_an_average_that_is_not_kept_have_no_effect(place: Any) -> None:
    place.config["ema_decay"] = 0.9
    assert "ema_decay has no effect: use_ema is false." in place.load().notices
