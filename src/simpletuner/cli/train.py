"""`simpletuner train`: check the configuration without torch, then hand over."""

import os
from pathlib import Path

from simpletuner.config.flags import parse
from simpletuner.config.load import load
from simpletuner.examples.pictures import EXAMPLES, materialise


def run(arguments: list[str]) -> int:
    """Check the configuration, then train. Returns the exit code.

    Raises:
        UserError: a problem the user can mend.
    """
    example = parse(arguments).selectors.get("example")
    if example in EXAMPLES:
        materialise(example, Path("datasets") / example)
    loaded = load(arguments, folder=Path(), environ=os.environ)
    from simpletuner.train.assemble import train  # torch: only once the configuration is known to be good

    return train(loaded)
