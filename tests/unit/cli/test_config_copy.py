import json
from pathlib import Path

import pytest

from simpletuner.cli.config_copy import config_copier, one_word_flags
from simpletuner.cli.loading import load_here


@pytest.fixture
def folder(own_folder: Path) -> Path:
    """A working folder with an environment of the name cats."""
    (own_folder / "datasets" / "cats").mkdir(parents=True)
    place = own_folder / "config" / "cats"
    place.mkdir(parents=True)
    route = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}]}
    (place / "routes.json").write_text(json.dumps(route))
    config = {"model_flavour": "tiny", "output_dir": "output/cats", "tread_config": "config/cats/routes.json"}
    (place / "config.json").write_text(json.dumps(config))
    (place / "multidatabackend.json").write_text(json.dumps([{"id": "cats", "instance_data_dir": "datasets/cats"}]))
    (place / "user_prompt_library.json").write_text(json.dumps({"one": "a cat"}))
    return own_folder


def test_what_is_kept_means_the_same_whatever_becomes_of_the_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--env", "cats", "--lora_rank", "8", "--use_ema"]
    with monkeypatch.context() as patched:
        patched.setenv("SIMPLETUNER_SEED", "7")
        before = load_here(arguments)
        kept = config_copier(before)(Path("aside"))
    for path in (folder / "config" / "cats").iterdir():
        path.unlink()
    after = load_here(kept)
    same = {"data_backend_config", "user_prompt_library"}
    assert after.config.model_dump(exclude=same) == before.config.model_dump(exclude=same)
    assert (after.datasets, after.prompts) == (before.datasets, before.prompts)
    assert (after.config.seed, after.config.lora_rank, after.config.use_ema) == (7, 8, True)
    assert not [word for word in kept if word.startswith("--env")]
    assert sorted(path.name for path in (folder / "aside").iterdir()) == [
        "config.json",
        "datasets.json",
        "prompts.json",
    ]


def test_of_an_example_nothing_is_copied(own_folder: Path) -> None:
    arguments = ["--example", "tiny-lora", "--output_dir=output/a"]
    kept = config_copier(load_here(arguments))(Path("aside"))
    assert kept == one_word_flags(arguments) == ["--example=tiny-lora", "--output_dir=output/a"]
    assert not (own_folder / "aside").exists()
