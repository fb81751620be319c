"""The configuration of whoever stands in this folder: what train, dataset and config begin with."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from simpletuner.base.commandline import flag, split_arguments
from simpletuner.base.console import answer_to, complain
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.files import file_errors_reported
from simpletuner.cli.like import Likeness, likeness
from simpletuner.config.flags import parse
from simpletuner.config.load import DATASETS_NAME, NO_CONFIGURATION, Examined, Loaded, examine
from simpletuner.flux2 import routes
from simpletuner.server.reach import of_the_page


def load_here(arguments: Sequence[str]) -> Loaded:
    """The configuration that `arguments` ask for in the working folder.

    Pictures of `--example NAME` are drawn to `datasets/NAME` before, unless they are there. With `--like FILE`, a
    person at a terminal is asked for what the file cannot say, and what comes from where is printed.

    Raises:
        ConfigError: every problem.
        DiskError: no space for the example's pictures.
    """
    like = likeness(arguments)
    if like is None:
        return examine_here(arguments).loaded()
    examined = examine_here(arguments)
    if answers := _answers(like, examined):
        examined = examine_here([*arguments, *answers])
    loaded = examined.loaded()
    values = loaded.config.model_dump(mode="json")
    typed = {argument.name for argument in split_arguments([*like.typed, *answers])}
    given = {
        name: values[name]
        for name, origin in loaded.origins.items()
        if name in typed or (origin != "default" and name not in like.options)
    }
    for line in like.lines({"data_backend_config": str(loaded.datasets_file), **given}):
        complain(line)
    return loaded


def _answers(like: Likeness, examined: Examined) -> list[str]:
    """Flags for what a person types about paths; none where nobody can be asked."""
    questions: list[tuple[str, str, str]] = []
    if examined.datasets_file is None:
        found = (Path(folder, DATASETS_NAME) for folder in ("", "config"))
        likely = next((str(path) for path in found if path.is_file()), "")
        questions.append(("data_backend_config", "The file that lists the datasets", likely))
    if examined.origins["output_dir"] == "default":
        questions.append(("output_dir", "The run's directory", examined.config.output_dir))
    if like.base_model is not None and examined.origins["pretrained_model_name_or_path"] == "default":
        weights = examined.config.model_flavour
        questions.append(("pretrained_model_name_or_path", f"Base weights, if not those of {weights}", ""))
    answers = []
    for name, question, proposed in questions:
        typed = answer_to(f"{question} [{proposed}]: " if proposed else f"{question}: ")
        if typed is None:
            break
        if typed or (proposed and name == "data_backend_config"):
            answers.append(flag(name, typed or proposed))
    return answers


def examine_here(arguments: Sequence[str], *, also: Sequence[Path] = ()) -> Examined:
    """The same, with the problems told and not raised. What the page started may name paths in the folders `also` too.

    Raises:
        DiskError: no space for the example's pictures.
    """
    reach = of_the_page(os.environ)
    like = likeness(arguments)
    if like is not None:
        if reach is not None:
            reach.real(str(like.file))
        arguments = like.arguments
    example = parse(arguments).selectors.get("example")
    if example is not None:
        # Brings Pillow, which nothing else here needs.
        from simpletuner.examples.pictures import EXAMPLES, materialize

        if example in EXAMPLES:
            folder = Path("datasets") / example
            materialize(example, folder if reach is None else reach.real(str(folder)))
    with file_errors_reported(Path(), ConfigError, doing="read"):
        rule = None if reach is None else replace(reach, others=(*reach.others, *also)).refusal
        examined = examine(arguments, folder=Path(), environ=os.environ, rule=rule)
    if like is not None:
        examined = replace(examined, problems=tuple(map(_without_datasets, examined.problems)))
    if examined.problems:
        return examined
    try:
        routes.check(examined.config)
    except ConfigError as error:
        found = tuple(replace(problem, key="tread_config") for problem in error.problems)
        return replace(examined, problems=found)
    return examined


def _without_datasets(problem: Problem) -> Problem:
    """The problem of a missing configuration, reworded for `--like`: only the datasets are missing."""
    if problem.found != NO_CONFIGURATION:
        return problem
    return Problem(
        "--like: no datasets are named here",
        "--data_backend_config PATH, the file that lists them",
        "A config.json here with datasets beside it does as well. `simpletuner init` writes both.",
    )
