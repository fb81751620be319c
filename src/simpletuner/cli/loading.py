"""The configuration of whoever stands in this folder: what train, dataset and config begin with."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from simpletuner.base.errors import ConfigError
from simpletuner.base.files import file_errors_reported
from simpletuner.config.flags import parse
from simpletuner.config.load import Examined, Loaded, examine
from simpletuner.flux2 import routes
from simpletuner.server.reach import of_the_page


def load_here(arguments: Sequence[str]) -> Loaded:
    """The configuration that `arguments` ask for in the working folder.

    Pictures of `--example NAME` are drawn to `datasets/NAME` before, unless they are there.

    Raises:
        ConfigError: every problem.
        DiskError: no space for the example's pictures.
    """
    return examine_here(arguments).loaded()


def examine_here(arguments: Sequence[str], *, also: Sequence[Path] = ()) -> Examined:
    """The same, with the problems told and not raised. What the page started may name paths in the folders `also` too.

    Raises:
        DiskError: no space for the example's pictures.
    """
    reach = of_the_page(os.environ)
    example = parse(arguments).selectors.get("example")
    if example is not None:
        # Brings Pillow, which nothing else here needs.
        from simpletuner.examples.pictures import EXAMPLES, materialise

        if example in EXAMPLES:
            folder = Path("datasets") / example
            materialise(example, folder if reach is None else reach.real(str(folder)))
    with file_errors_reported(Path(), ConfigError, doing="read"):
        rule = None if reach is None else replace(reach, others=(*reach.others, *also)).refusal
        examined = examine(arguments, folder=Path(), environ=os.environ, rule=rule)
    if examined.problems:
        return examined
    try:
        routes.check(examined.config)
    except ConfigError as error:
        found = tuple(replace(problem, key="tread_config") for problem in error.problems)
        return replace(examined, problems=found)
    return examined
