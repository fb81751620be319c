"""Models, cards and recipes that a configuration begins with."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.recipes import CARDS, MIN_STEPS, RECIPES
from simpletuner.config.run import OPTION_NAMES


def test_every_model_says_what_it_is_and_what_it_takes(client: TestClient) -> None:
    models = {model["name"]: model for model in client.get("/api/recipes").json()["models"]}
    assert models.keys() == {name for name, flavour in FLAVOURS.items() if not flavour.is_distilled}
    assert all(model["summary"] and model["licence"] for model in models.values())
    assert models["dev"]["download_bytes"] == pytest.approx(99.3e9, rel=0.01)
    assert (models["tiny"]["download_bytes"], models["tiny"]["is_embedded"]) == (0, True)
    assert (models["klein-4b"]["licence"], models["klein-4b"]["is_embedded"]) == ("Apache-2.0", False)
    assert (models["dev"]["preview"], models["klein-4b"]["preview"]) == (None, "klein-4b-distilled")
    assert (models["dev"]["options"], models["tiny"]["options"]) == ({}, {"validation_resolution": "128x128"})
    assert all(model["options"].keys() == model["sources"].keys() for model in models.values())


def test_recipes_and_cards_come_with_the_source_of_each_value(client: TestClient) -> None:
    told = client.get("/api/recipes").json()
    assert [(one["name"], one["flavour"]) for one in told["recipes"]] == [(one.name, one.flavour) for one in RECIPES]
    for one in told["recipes"]:
        assert set(one["options"]) == set(one["sources"]) <= set(OPTION_NAMES)
        assert one["options"]["max_train_steps"] is None, "a number of steps would win over the recipe's epochs"
    assert [card["name"] for card in told["cards"]] == [one.name for one in CARDS]
    for card, one in zip(told["cards"], CARDS, strict=True):
        assert {name: fit["options"] for name, fit in card["fits"].items()} == {
            name: fit.options for name, fit in one.fits.items()
        }
    assert told["least_steps"] == MIN_STEPS
    assert any("does not write yet" in one["needs"] for one in told["recipes"] if one["name"] == "edit")


@pytest.mark.parametrize(
    ("memory", "gib", "card"), [("24564", 23.99, "24 GB"), ("81559", 79.65, "80 GB"), ("6144", 6.0, None)]
)
def test_a_gpu_of_this_machine_is_found_with_the_card_that_suits_it(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str, gib: float, card: str | None
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '0, NVIDIA RTX, 570.86.15, {memory}, 1024, 37'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (found,) = client.get("/api/recipes").json()["gpus"]
    assert (found["name"], found["card"]) == ("NVIDIA RTX", card)
    assert found["vram_gib"] == pytest.approx(gib, abs=0.01)


def test_a_machine_without_a_gpu_offers_none(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert client.get("/api/recipes").json()["gpus"] == []
