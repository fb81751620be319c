"""Recognize config files of other trainers, and translate the settings that have the same meaning here."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.base.commandline import command_text
from simpletuner.base.errors import Problem
from simpletuner.config.datasets import ImageSet
from simpletuner.config.given import refused
from simpletuner.config.options.kinds import Slice
from simpletuner.config.other_keys import OPTION_NICKNAMES, OTHER_SET_KEYS
from simpletuner.config.run import RunConfig
from simpletuner.config.values import from_text, kinds


@dataclass(frozen=True)
class OtherFormat:
    """A file format of another trainer."""

    name: str
    marks: frozenset[str]
    """Keys, at any depth, by which the format is recognized; all must be present."""


OTHER_FORMATS = (
    OtherFormat("an ai-toolkit job file", frozenset({"job", "config", "process"})),
    OtherFormat("a OneTrainer config", frozenset({"training_method", "concept_file_name"})),
    OtherFormat("a diffusion-pipe config", frozenset({"micro_batch_size_per_gpu"})),
    OtherFormat("a diffusion-pipe config", frozenset({"pipeline_stages"})),
    OtherFormat("a diffusion-pipe dataset config", frozenset({"directory", "path"})),
    OtherFormat("a musubi-tuner dataset config", frozenset({"datasets", "image_directory"})),
    OtherFormat("a musubi-tuner dataset config", frozenset({"datasets", "image_jsonl_file"})),
    OtherFormat("a kohya dataset config", frozenset({"datasets", "subsets"})),
    OtherFormat("a kohya config", frozenset({"network_module"})),
    OtherFormat("a kohya config", frozenset({"train_data_dir"})),
    OtherFormat("an accelerate config", frozenset({"compute_environment", "distributed_type"})),
)
"""Formats in the order in which they are tried."""

TEXT_FORMATS = {".yaml": "YAML", ".yml": "YAML", ".env": "a file of shell variables"}
"""Suffixes of config formats that this program does not read."""

OUR_CONFIG = "simpletuner's config.json or config.toml"
OUR_DATASETS = "simpletuner's multidatabackend.json"

_CARRIED = (
    "learning_rate",
    "lora_rank",
    "lora_alpha",
    "max_train_steps",
    "num_train_epochs",
    "train_batch_size",
    "gradient_accumulation_steps",
    "checkpoint_step_interval",
    "num_processes",
    "num_machines",
    "seed",
)
"""Options whose values mean the same in other trainers."""
_CARRIED_OF_SETS = ("instance_data_dir", "resolution")
_TO_SETS = {**OTHER_SET_KEYS.nicknames, "train_data_dir": "instance_data_dir"}

_LINE = re.compile(
    r"^[ \t]*(?:-[ \t]+)?(?:export[ \t]+)?[\"']?([A-Za-z_]\w*)[\"']?[ \t]*[:=][ \t]*([^\n#]*)", re.MULTILINE
)
"""A key in YAML or in a shell script, and its value on the same line."""


def other_format(document: Any) -> str | None:
    """The other trainer's format that `document` has; None if it may be our own."""
    return _format_of({key for key, _ in _settings(document)})


def other_trainer_problem(label: str, name: str, document: Any, expected: str = OUR_CONFIG) -> Problem:
    """The problem that the file `label` has the format `name`. Its remedy gives the settings that carry over."""
    return _problem(label, name, list(_settings(document)), expected)


def other_text_problem(label: str, suffix: str, text: str) -> Problem:
    """Like `other_trainer_problem`, for a file with a suffix of `TEXT_FORMATS`, which is parsed line by line."""
    settings = [(key.lower(), value.strip().strip("\"'")) for key, value in _LINE.findall(text)]
    name = _format_of({key for key, _ in settings})
    return _problem(label, name or TEXT_FORMATS[suffix], settings, OUR_CONFIG)


def _format_of(keys: set[str]) -> str | None:
    return next((known.name for known in OTHER_FORMATS if known.marks <= keys), None)


def _settings(document: Any) -> Iterator[tuple[str, Any]]:
    """Every key at any depth, with its value."""
    if isinstance(document, list):
        for item in document:
            yield from _settings(item)
    elif isinstance(document, dict):
        for key, value in document.items():
            yield str(key), value
            yield from _settings(value)


def _problem(label: str, name: str, settings: list[tuple[str, Any]], expected: str) -> Problem:
    options: dict[str, Any] = {}
    of_set: dict[str, Any] = {}
    for key, value in settings:
        _carry(RunConfig, OPTION_NICKNAMES.get(key, key), value, _CARRIED, options)
        _carry(ImageSet, _TO_SETS.get(key, key), value, _CARRIED_OF_SETS, of_set)
    sentences = []
    if options:
        flags = command_text(
            *(
                f"--{key}={value:g}" if isinstance(value, float) else f"--{key}={value}"
                for key, value in options.items()
            )
        )
        sentences.append(f"Its values as flags of this program: {flags}")
    if of_set:
        pairs = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in of_set.items())
        sentences.append(f"For an image set in multidatabackend.json: {pairs}")
    remedy = "".join(f"{sentence}. " for sentence in sentences) + "Begin with simpletuner init."
    return Problem(f"{label}: this is {name}", expected, remedy)


def _carry(model: type[Slice], name: str, value: Any, names: tuple[str, ...], carried: dict[str, Any]) -> None:
    """Add `value` to `carried` if `model` accepts it. The first value of a name counts."""
    if name in names and name not in carried:
        parsed = from_text(str(value), kinds(model)[name])
        if name not in refused(model, {name: parsed}):
            carried[name] = parsed


def is_text_format(path: Path) -> bool:
    """Whether the suffix of `path` is one of `TEXT_FORMATS`, which this program does not read."""
    return path.suffix in TEXT_FORMATS
