"""The configuration of a run that waits, kept as it was when it was put in the queue."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from simpletuner.base.files import file_errors_reported
from simpletuner.cli.loading import examine_here
from simpletuner.config.flags import SELECTORS, parse
from simpletuner.config.load import Loaded
from simpletuner.config.run import RunConfig
from simpletuner.config.values import kinds


def kept_aside(loaded: Loaded) -> Callable[[Path], list[str]]:
    """Makes the arguments that train what `loaded` was loaded for, whatever becomes of the files they name: it copies
    config, datasets and prompts into the folder it is given. What the environment sets becomes flags. What it copied is
    checked once more, since the files may have changed since they were loaded.

    An example of the program has no files that change.
    """

    def keep(folder: Path) -> list[str]:
        values = loaded.config.model_dump(mode="json")
        words = [*spelled(loaded.arguments), *(f"--{key}={_text(values[key])}" for key in _fixed(loaded))]
        if "example" in parse(loaded.arguments).selectors:
            return words
        words = [word for word in words if word.partition("=")[0].removeprefix("--") not in SELECTORS]
        words += [f"--{flag}={_copied(source, folder / name)}" for flag, source, name in _files(loaded)]
        examine_here(words, also=(folder.absolute(),)).loaded()
        return words

    return keep


def spelled(arguments: Sequence[str]) -> list[str]:
    """The same flags, each in one word: `--name=value`, or `--name`."""
    flags = parse(arguments)
    selectors = [f"--{name}={value}" for name, value in flags.selectors.items()]
    return selectors + [
        f"--{name}" if given.value is True else f"--{name}={given.value}" for name, given in flags.options.items()
    ]


def _fixed(loaded: Loaded) -> list[str]:
    """Options whose value stands neither in the config nor on the command line: in the environment, or in a file that
    these name.
    """
    return [
        key
        for key, kind in kinds(RunConfig).items()
        if loaded.origins[key] == "environment" or (kind.is_json and loaded.origins[key] != "default")
    ]


def _text(value: object) -> str:
    """A value as a flag has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _files(loaded: Loaded) -> list[tuple[str, Path, str]]:
    """What is read: the flag that leads there, the file, and the name it is kept under."""
    found = [("data_backend_config", loaded.datasets_file, f"datasets{loaded.datasets_file.suffix}")]
    if loaded.config_file is not None:
        found.append(("config", loaded.config_file, f"config{loaded.config_file.suffix}"))
    if loaded.prompts_file is not None:
        found.append(("user_prompt_library", loaded.prompts_file, f"prompts{loaded.prompts_file.suffix}"))
    return found


def _copied(source: Path, target: Path) -> Path:
    with file_errors_reported(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target
