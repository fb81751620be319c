import json
from pathlib import Path

import pytest

from simpletuner.base.errors import ConfigError
from simpletuner.cli import config
from simpletuner.cli.loading import load_here
from simpletuner.config.run import OPTION_NAMES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration that is right."""
    (tmp_path / "datasets" / "cats").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_flavour": "tiny", "lora_rank": 8}))
    datasets = [{"id": "cats", "instance_data_dir": "datasets/cats"}]
    (tmp_path / "multidatabackend.json").write_text(json.dumps(datasets))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_check_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.run(["check", "--seed=1", "--huber_c=0.2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "huber_c has no effect: loss_type is l2.",
        "The configuration is valid: 4 options set, 1 training datasets, 0 held-out datasets, 0 prompts.",
    ]


@pytest.mark.usefixtures("folder")
def test_show_lists_every_option_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.run(["show", "--seed=1"]) == 0
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == list(OPTION_NAMES)
    assert ["lora_rank", "file", "8"] in rows
    assert ["seed", "flag", "1"] in rows
    assert ["model_type", "default", "'lora'"] in rows


def test_it_must_be_told_what_to_do() -> None:
    with pytest.raises(ConfigError, match="expected check or show"):
        config.run([])


def test_the_examples_pictures_are_drawn_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_here(["--example", "tiny-lora"])
    assert len(list(Path(loaded.datasets.train_sets[0].instance_data_dir).glob("*.png"))) == 20
    with pytest.raises(ConfigError, match="expected tiny-lora"):
        load_here(["--example", "nope"])


@pytest.mark.usefixtures("folder")
def test_check_as_json_has_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.run(["check", "--json", "--seed=1", "--huber_c=0.2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == []
    assert told["notices"] == ["huber_c has no effect: loss_type is l2."]
    assert list(told["values"]) == list(told["origins"]) == list(OPTION_NAMES)
    assert (told["values"]["lora_rank"], told["origins"]["lora_rank"]) == (8, "file")
    assert (told["values"]["seed"], told["origins"]["seed"]) == (1, "flag")


@pytest.mark.usefixtures("folder")
def test_check_as_json_tells_problems_with_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.run(["check", "--json", "--learning_rate=-1", "--lora_rnak=3"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == [
        {
            "found": "--learning_rate = -1.0",
            "expected": "a number above 0",
            "remedy": "",
            "key": "learning_rate",
            "text": "--learning_rate = -1.0: expected a number above 0.",
        },
        {
            "found": "--lora_rnak: no such option",
            "expected": "",
            "remedy": "Did you mean --lora_rank?",
            "key": "lora_rnak",
            "text": "--lora_rnak: no such option. Did you mean --lora_rank?",
        },
    ]
    assert told["values"]["lora_rank"] == 8


@pytest.mark.usefixtures("folder")
def test_check_as_json_knows_routes_of_tread(capsys: pytest.CaptureFixture[str]) -> None:
    route = '{"routes": [{"selection_ratio": 0.5, "start_layer_idx": 90, "end_layer_idx": 91}]}'
    assert config.run(["check", "--json", f"--tread_config={route}"]) == 2
    (problem, *_) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["key"] == "tread_config"
