"""`python -m simpletuner`: the same as the command `simpletuner`."""

import os
import sys

# Python puts the working folder first on its path here. A user's `datasets/` would be found where libraries look for
# the package of that name.
if sys.path[:1] in ([""], [os.getcwd()]):
    del sys.path[0]

from simpletuner.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
