"""Copies of a queued run's configuration, so that later changes of the files do not affect the run."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from simpletuner.base.files import file_errors_reported
from simpletuner.cli.loading import examine_here
from simpletuner.config.flags import SELECTORS, parse
from simpletuner.config.load import LoadedConfig
from simpletuner.config.run import RunConfig
from simpletuner.config.values import kinds


def config_copier(loaded: LoadedConfig) -> Callable[[Path], list[str]]:
    """A function that copies the configuration of `loaded` into a folder and returns the arguments that train it.

    It copies the config, datasets and prompts files and turns values from the environment into flags, so the arguments
    stay valid when the original files change. It checks the copies again, because the files may have changed since
    `loaded` was read. The configuration of an example is part of the program and is not copied.
    """

    def copy_config(folder: Path) -> list[str]:
        values = loaded.config.model_dump(mode="json")
        words = [
            *one_word_flags(loaded.arguments),
            *(f"--{key}={_flag_text(values[key])}" for key in _options_from_elsewhere(loaded)),
        ]
        if "example" in parse(loaded.arguments).selectors:
            return words
        words = [word for word in words if word.partition("=")[0].removeprefix("--") not in SELECTORS]
        words += [f"--{flag}={_copy(source, folder / name)}" for flag, source, name in _files(loaded)]
        examine_here(words, extra_roots=(folder.absolute(),)).loaded()
        return words

    return copy_config


def one_word_flags(arguments: Sequence[str]) -> list[str]:
    """The flags in `arguments`, each in one word: `--name=value`, or `--name`."""
    flags = parse(arguments)
    selectors = [f"--{name}={value}" for name, value in flags.selectors.items()]
    return selectors + [
        f"--{name}" if given.value is True else f"--{name}={given.value}" for name, given in flags.options.items()
    ]


def _options_from_elsewhere(loaded: LoadedConfig) -> list[str]:
    """Options whose value comes from the environment, or from a JSON file that the config or a flag names. The copied
    config does not contain these values."""
    return [
        key
        for key, kind in kinds(RunConfig).items()
        if loaded.origins[key] == "environment" or (kind.is_json and loaded.origins[key] != "default")
    ]


def _flag_text(value: object) -> str:
    """`value` as text after a flag."""
    return value if isinstance(value, str) else json.dumps(value)


def _files(loaded: LoadedConfig) -> list[tuple[str, Path, str]]:
    """The files of the configuration: the flag that names each, its path, and the name of its copy."""
    files = [("data_backend_config", loaded.datasets_file, f"datasets{loaded.datasets_file.suffix}")]
    if loaded.config_file is not None:
        files.append(("config", loaded.config_file, f"config{loaded.config_file.suffix}"))
    if loaded.prompts_file is not None:
        files.append(("user_prompt_library", loaded.prompts_file, f"prompts{loaded.prompts_file.suffix}"))
    return files


def _copy(source: Path, target: Path) -> Path:
    with file_errors_reported(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target
