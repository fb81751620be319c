"""The table of what preservation keeps: each run once, and the mean over seeds with its error."""

import json
from pathlib import Path

import pytest

import embedded_preservation
from embedded_preservation import Grade, Run
from simpletuner.config.load import load


def test_what_is_graded_is_not_trained_again_and_the_table_has_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def train(run: Run, folder: Path, steps: int) -> Path:
        assert steps == 7
        trained.append(run.name)
        return folder / "output" / run.name

    def grade(run: Run, folder: Path, pictures: int) -> Grade:
        assert (folder.name, pictures) == (run.name, 50)
        return Grade(run.way, run.weight, run.seed, 0.9 + 0.04 * run.seed, 0.95, 0.5 * run.weight)

    monkeypatch.setattr(Run, "train", train)
    monkeypatch.setattr(embedded_preservation, "grade", grade)
    monkeypatch.setattr(embedded_preservation, "materialize", lambda name, folder: None)
    ways = [str(tmp_path), "none=0", "class=0.5", "--steps=7"]
    assert embedded_preservation.main([*ways, "--seeds", "1"]) == 0
    assert embedded_preservation.main([*ways, "--seeds", "1", "2"]) == 0
    assert trained == ["none-0-1", "class-0.5-1", "none-0-2", "class-0.5-2"]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| none | 0 | 2 | 96.0 ± 2.0 | 95.0 ± 0.0 | 0.000 ± 0.000 |",
        "| class | 0.5 | 2 | 96.0 ± 2.0 | 95.0 ± 0.0 | 0.250 ± 0.000 |",
    ]


def test_each_way_is_a_configuration_of_the_example(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_folder / "datasets" / "tiny-lora").mkdir(parents=True)
    for part in ("train", "prior"):
        (own_folder / "datasets" / "tiny-lora" / part).mkdir()
    commands: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: commands.append(command))
    runs = [Run("none", 0, 1), Run("class", 2, 1), Run("blank", 0.5, 1), Run("set", 1, 3)]
    for run in runs:
        run.train(own_folder, 4)
    read = [load([command[-1]], folder=own_folder, environ={}) for command in commands]
    assert [each.config.preservation for each in read] == ["none", "class", "blank", "none"]
    assert [each.config.preservation_weight for each in read] == [1, 2, 0.5, 1]
    assert [each.config.seed for each in read] == [1, 1, 1, 3]
    assert [[one.is_regularisation_data for one in each.datasets.train_sets] for each in read] == [
        [False, False],
        [False, False],
        [False, False],
        [False, True],
    ]
    assert json.loads((own_folder / "config" / "class-2-1.json").read_text())["max_train_steps"] == 4
