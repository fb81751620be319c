"""`simpletuner ARGUMENTS` with deterministic kernels: python deterministic_command.py MOMENT ARGUMENTS…

MOMENT is one of those of tests/recipes/killed.py, at which the command kills itself, or "never".
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

from simpletuner.cli.main import main

KILLED = Path(__file__).parents[1] / "recipes" / "killed.py"

if __name__ == "__main__":
    moment, *arguments = sys.argv[1:]
    torch.use_deterministic_algorithms(True)
    if moment != "never":
        found = spec_from_file_location("killed", KILLED)
        assert found is not None
        assert found.loader is not None
        killed = module_from_spec(found)
        found.loader.exec_module(killed)
        place, _, count = moment.partition(":")
        killed.arm(place, int(count))
    sys.exit(main(arguments))
