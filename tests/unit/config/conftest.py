"""A working folder with a configuration that is right, to be spoiled by each test."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from simpletuner.base.errors import ConfigError
from simpletuner.config.load import LoadedConfig, load

CONFIG = {"model_flavour": "tiny", "max_train_steps": 10}
IMAGES = {"id": "cats", "type": "local", "instance_data_dir": "datasets/cats", "caption_strategy": "textfile"}
TEXT = {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"}


class Workplace:
    """A working folder. `load` reads what `config` and `datasets` hold at that moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Any = dict(CONFIG)
        self.datasets: Any = [dict(IMAGES), dict(TEXT)]
        (folder / "datasets" / "cats").mkdir(parents=True)
        (folder / "config").mkdir()

    def write(self, name: str, content: object) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def load(self, *arguments: str, environ: Mapping[str, str] | None = None) -> LoadedConfig:
        if self.config is not None:
            self.write("config/config.json", self.config)
        if self.datasets is not None:
            self.write("config/multidatabackend.json", self.datasets)
        return load(arguments, folder=self.folder, environ=environ or {})

    def problems(self, *arguments: str, environ: Mapping[str, str] | None = None) -> list[str]:
        """What is wrong, one text for each problem."""
        with pytest.raises(ConfigError) as caught:
            self.load(*arguments, environ=environ)
        return [str(problem) for problem in caught.value.problems]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def problem_of(place: Workplace) -> Callable[..., str]:
    """The only problem of the configuration with these keys changed."""

    def only_problem(**changes: object) -> str:
        place.config |= changes
        (problem,) = place.problems()
        return problem

    return only_problem
