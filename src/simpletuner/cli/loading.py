"""Load the configuration that a command's arguments select in the working folder."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from simpletuner.base.commandline import flag, split_arguments
from simpletuner.base.console import ask_user, complain
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.files import file_errors_reported
from simpletuner.cli.like import LikeOptions, like_options
from simpletuner.config.flags import parse
from simpletuner.config.load import DATASETS_NAME, NO_CONFIGURATION, ExaminedConfig, LoadedConfig, examine
from simpletuner.config.paths import allow_any_path
from simpletuner.flux2 import routes
from simpletuner.server.reach import page_reach


def load_here(arguments: Sequence[str]) -> LoadedConfig:
    """The configuration that `arguments` select in the working folder.

    `--example NAME` first writes the example's images to `datasets/NAME`, unless they exist. `--like FILE` asks at a
    terminal for the paths that the file cannot contain, and prints the origin of each option.

    Raises:
        ConfigError: all problems of the configuration together.
        DiskError: no space for the example's images.
    """
    like = like_options(arguments)
    if like is None:
        return examine_here(arguments).loaded()
    examined = examine_here(arguments)
    if answers := _answers(like, examined):
        examined = examine_here([*arguments, *answers])
    loaded = examined.loaded()
    values = loaded.config.model_dump(mode="json")
    typed = {argument.name for argument in split_arguments([*like.typed, *answers])}
    local_options = {
        name: values[name]
        for name, origin in loaded.origins.items()
        if name in typed or (origin != "default" and name not in like.options)
    }
    for line in like.lines({"data_backend_config": str(loaded.datasets_file), **local_options}):
        complain(line)
    return loaded


def _answers(like: LikeOptions, examined: ExaminedConfig) -> list[str]:
    """Flags with the paths that the user types when asked; empty without a terminal."""
    questions: list[tuple[str, str, str]] = []
    if examined.datasets_file is None:
        candidates = (Path(folder, DATASETS_NAME) for folder in ("", "config"))
        likely = next((str(path) for path in candidates if path.is_file()), "")
        questions.append(("data_backend_config", "The file that lists the datasets", likely))
    if examined.origins["output_dir"] == "default":
        questions.append(("output_dir", "The run's directory", examined.config.output_dir))
    if like.base_model is not None and examined.origins["pretrained_model_name_or_path"] == "default":
        weights = examined.config.model_flavour
        questions.append(("pretrained_model_name_or_path", f"Base weights, if not those of {weights}", ""))
    answers = []
    for name, question, proposed in questions:
        typed = ask_user(f"{question} [{proposed}]: " if proposed else f"{question}: ")
        if typed is None:
            break
        if typed or (proposed and name == "data_backend_config"):
            answers.append(flag(name, typed or proposed))
    return answers


def examine_here(arguments: Sequence[str], *, extra_roots: Sequence[Path] = ()) -> ExaminedConfig:
    """The same as `load_here`, but with the problems in the result instead of raised, and without questions. A command
    that the page started may also name paths in the folders `extra_roots`.

    Raises:
        DiskError: no space for the example's images.
    """
    reach = page_reach(os.environ)
    like = like_options(arguments)
    if like is not None:
        if reach is not None:
            reach.checked_path(str(like.file))
        arguments = like.arguments
    example = parse(arguments).selectors.get("example")
    if example is not None:
        # Imported late, because it loads Pillow.
        from simpletuner.examples.pictures import EXAMPLES, materialize

        if example in EXAMPLES:
            folder = Path("datasets") / example
            materialize(example, folder if reach is None else reach.checked_path(str(folder)))
    with file_errors_reported(Path(), ConfigError, doing="read"):
        reach = reach and replace(reach, extra_roots=(*reach.extra_roots, *extra_roots))
        rule = allow_any_path if reach is None else reach.refusal
        examined = examine(arguments, folder=Path(), environ=os.environ, rule=rule)
    if like is not None:
        examined = replace(examined, problems=tuple(map(_without_datasets, examined.problems)))
    if examined.problems:
        return examined
    try:
        routes.check(examined.config)
    except ConfigError as error:
        problems = tuple(replace(problem, key="tread_config") for problem in error.problems)
        return replace(examined, problems=problems)
    return examined


def _without_datasets(problem: Problem) -> Problem:
    """`problem`, reworded for `--like` if it is the missing configuration: only the datasets are missing."""
    if problem.found != NO_CONFIGURATION:
        return problem
    return Problem(
        "--like: no datasets are named here",
        "--data_backend_config PATH, the file that lists them",
        "Or put a config.json and its datasets file here; `simpletuner init` writes both.",
    )
