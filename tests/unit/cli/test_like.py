"""`train --like FILE`: the options in a file's header, before those that are typed; what it cannot say is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from simpletuner.base.errors import AccessError, ConfigError
from simpletuner.cli import loading
from simpletuner.cli.config_copy import config_copier
from simpletuner.cli.like import like_options
from simpletuner.cli.loading import load_here
from simpletuner.cli.main import main
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.record import recorded_options, weight_options
from simpletuner.config.run import RunConfig

TRAINED: dict[str, Any] = {
    "model_flavour": "tiny",
    "lora_rank": 24,
    "learning_rate": 3e-4,
    "gradient_checkpointing": False,
    "flow_schedule_shift": 2.5,
    "caption_dropout_probability": 0.2,
    "tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}]},
    "peft_lora_target_modules": ["to_q", "to_k"],
    "train_batch_size": 2,
    "gradient_accumulation_steps": 3,
}


def record_of(**options: Any) -> dict[str, Any]:
    """The options of a run, as its files have them."""
    flavour = FLAVOURS[options.get("model_flavour", "dev")]
    return weight_options(json.loads(json.dumps(recorded_options(RunConfig(**(flavour.option_defaults | options))))))


def lora(path: Path, options: object, **fields: str) -> Path:
    """A file whose header has `options`, as JSON where they are no text."""
    text = options if isinstance(options, str) else json.dumps(options)
    header = {"format": "pt", "simpletuner.options": text}
    header |= {f"simpletuner.{name}": value for name, value in fields.items()}
    save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(1, 1)}, path, header)
    return path


@pytest.fixture
def folder(own_folder: Path) -> Path:
    """A working folder with datasets and no configuration."""
    (own_folder / "datasets" / "cats").mkdir(parents=True)
    datasets = [{"id": "cats", "instance_data_dir": "datasets/cats"}]
    (own_folder / "sets.json").write_text(json.dumps(datasets))
    lora(own_folder / "cats.safetensors", record_of(**TRAINED), step="700", base_model="tiny-1")
    return own_folder


@pytest.mark.usefixtures("folder")
def test_another_run_decides_the_weights_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """All options that decide them, and nothing else, come from the header."""
    loaded = load_here(["--like", "cats.safetensors", "--data_backend_config=sets.json", "--output_dir=output/new"])
    assert json.loads(json.dumps(weight_options(recorded_options(loaded.config)))) == record_of(**TRAINED)
    assert loaded.config.max_train_steps == 700
    told = capsys.readouterr().err
    assert "From cats.safetensors: " in told
    for shown in ("lora_rank = 24", "max_train_steps = 700", "peft_lora_target_modules = "):
        assert shown in told
    assert "Set here: data_backend_config = 'sets.json', output_dir = 'output/new'." in told
    assert "learning_rate = 0.0003" in told
    assert "lr_scheduler" not in told, "it is at its default"
    # What the processes of several ranks, and the queue, are started with, says the same without the file.
    Path("cats.safetensors").unlink()
    assert load_here(loaded.arguments).config == loaded.config
    kept = load_here(config_copier(loaded)(Path("aside")))
    assert weight_options(recorded_options(kept.config)) == weight_options(recorded_options(loaded.config))


@pytest.mark.usefixtures("folder")
def test_what_is_typed_wins_over_the_file_and_the_file_over_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.json").write_text(
        json.dumps({"lora_rank": 4, "output_dir": "output/own", "data_backend_config": "sets.json", "seed": 5})
    )
    typed = ["--learning_rate", "1e-5", "--like=cats.safetensors", "--max_train_steps=9"]
    loaded = load_here(typed)
    config = loaded.config
    assert (config.lora_rank, config.learning_rate, config.max_train_steps) == (24, 1e-5, 9)
    assert config.output_dir == "output/own"
    told = capsys.readouterr().err
    own, here = told.splitlines()[:2]
    assert "max_train_steps" not in own
    assert "learning_rate" not in own
    assert "learning_rate" in here
    assert "output_dir = 'output/own'" in here


@pytest.mark.usefixtures("folder")
def test_what_is_typed_wins_by_another_name_and_over_what_replaces_it(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["--flux_schedule_shift=3.5", "--num_train_epochs=3", "--flux_lora_target=tiny"]
    loaded = load_here(["--like=cats.safetensors", "--data_backend_config=sets.json", *typed])
    config = loaded.config
    assert (config.flow_schedule_shift, config.max_train_steps, config.num_train_epochs) == (3.5, None, 3)
    assert (config.peft_lora_target_modules, config.flux_lora_target) == (None, "tiny")
    assert not any("has no effect" in notice for notice in loaded.notices)
    own, here = capsys.readouterr().err.splitlines()[:2]
    for name in ("flow_schedule_shift", "num_train_epochs", "flux_lora_target"):
        assert name not in own
        assert name in here


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("option", [{"flow_custom_timesteps": "200,800"}, {"flow_schedule_auto_shift": True}])
def test_a_typed_shift_wins_over_timesteps_of_the_file(option: dict[str, object]) -> None:
    lora(Path("odd.safetensors"), record_of(**TRAINED | option))
    loaded = load_here(["--like=odd.safetensors", "--data_backend_config=sets.json", "--flow_schedule_shift=3.5"])
    assert loaded.config.flow_schedule_shift == 3.5
    assert (loaded.config.flow_custom_timesteps, loaded.config.flow_schedule_auto_shift) == (None, False)
    assert not any("has no effect" in notice for notice in loaded.notices)


def test_a_header_cannot_choose_paths_or_what_is_about_a_machine(folder: Path) -> None:
    record = record_of(**TRAINED) | {
        "output_dir": "/etc",
        "data_backend_config": "/etc/passwd",
        "init_lora": "/root/x.safetensors",
        "pretrained_model_name_or_path": "/somewhere/model",
        "num_processes": 64,
        "max_workers": 99,
        "shiny_new_option": 1,
    }
    like = like_options(["--like", str(lora(folder / "odd.safetensors", record))])
    assert like is not None
    assert like.left_out == ("shiny_new_option",)
    as_json = {"tread_config": record["tread_config"], "peft_lora_target_modules": ["to_q", "to_k"]}
    assert like.options == TRAINED | as_json
    assert any("shiny_new_option" in line for line in like.lines({}))


@pytest.mark.usefixtures("folder")
def test_without_a_terminal_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--like", "cats.safetensors"]) == 2
    told = capsys.readouterr().err
    assert "--like: no datasets are named here: expected --data_backend_config PATH" in told
    assert "no configuration here" not in told


@pytest.mark.usefixtures("folder")
def test_at_a_terminal_it_asks_for_datasets_and_paths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sets.json").rename("multidatabackend.json")
    lora(Path("mine.safetensors"), record_of(**TRAINED), base_model="my-own-finetune")
    asked: list[str] = []
    answers = iter(["", "output/second", ""])

    def answer(question: str) -> str:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr(loading, "ask_user", answer)
    loaded = load_here(["--like", "mine.safetensors"])
    assert asked == [
        "The file that lists the datasets [multidatabackend.json]: ",
        "The run's directory [output/flux2]: ",
        "Base weights, if not those of tiny: ",
    ]
    assert (loaded.datasets_file, loaded.config.output_dir) == (Path("multidatabackend.json"), "output/second")
    told = capsys.readouterr().err
    assert "It was trained on 'my-own-finetune', whose location the header does not contain." in told
    assert "Set here: data_backend_config = 'multidatabackend.json', output_dir = 'output/second'." in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[1]", "is damaged"),
        ({"model_flavour": "tiny", "lora_rank": "many"}, "lora_rank = 'many': expected"),
        ({"model_flavour": "huge"}, "model_flavour = 'huge'"),
        ({"model_flavour": "tiny", "lora_rank": {"a": [1]}}, "lora_rank"),
    ],
)
def test_damaged_headers_are_refused(folder: Path, options: object, told: str) -> None:
    file = lora(folder / "bad.safetensors", options)
    with pytest.raises(ConfigError, match=told):
        load_here(["--like", str(file), "--data_backend_config=sets.json"])


@pytest.mark.usefixtures("folder")
def test_files_that_say_nothing_are_refused() -> None:
    save_file({"a": torch.zeros(1)}, "foreign.safetensors", {"ss_network_dim": "8"})
    Path("text.safetensors").write_text("no tensors")
    Path("folder").mkdir()
    for file, kind, told in (
        ("foreign.safetensors", ConfigError, "lacks the training options"),
        ("text.safetensors", AccessError, "safetensors"),
        ("gone.safetensors", ConfigError, "no such file"),
        ("folder", ConfigError, "no such file"),
    ):
        with pytest.raises(kind, match=told):
            load_here(["--like", file, "--data_backend_config=sets.json"])
    with pytest.raises(ConfigError, match="no file is named"):
        load_here(["--like"])


def test_a_step_that_is_none_decides_nothing(folder: Path) -> None:
    for step in ("0", "-3", "x", "9" * 5000):
        like = like_options(["--like", str(lora(folder / "odd.safetensors", record_of(**TRAINED), step=step))])
        assert like is not None
        assert "max_train_steps" not in like.options


def test_a_runs_directory_stands_for_its_file(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "cats.safetensors").rename(folder / "run" / "pytorch_lora_weights.safetensors")
    like = like_options(["--like", "run"])
    assert like is not None
    assert like.options["lora_rank"] == 24
