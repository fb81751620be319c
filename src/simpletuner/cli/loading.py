"""The configuration of whoever stands in this folder: what train, dataset and config begin with."""

import os
from collections.abc import Sequence
from pathlib import Path

from simpletuner.config.flags import parse
from simpletuner.config.load import Loaded, load
from simpletuner.flux2 import routes


def load_here(arguments: Sequence[str]) -> Loaded:
    """The configuration that `arguments` ask for in the working folder.

    Pictures of `--example NAME` are drawn to `datasets/NAME` before, unless they are there.

    Raises:
        ConfigError: every problem.
        DiskError: no space for the example's pictures.
    """
    example = parse(arguments).selectors.get("example")
    if example is not None:
        # Brings Pillow, which nothing else here needs.
        from simpletuner.examples.pictures import EXAMPLES, materialise

        if example in EXAMPLES:
            materialise(example, Path("datasets") / example)
    loaded = load(arguments, folder=Path(), environ=os.environ)
    routes.check(loaded.config)
    return loaded
