"""The command `simpletuner`, also as `python -m simpletuner`."""

from simpletuner.base.signals import STOPPED, deferred_signals

deferred_signals.__enter__()  # before anything that takes long enough to be interrupted

import contextlib  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

# Python puts the working folder first on its path here. A user's `datasets/` would be found where libraries look for
# the package of that name.
with contextlib.suppress(FileNotFoundError):  # the working folder has been removed
    if __name__ == "__main__" and sys.path[:1] in ([""], [os.getcwd()]):
        del sys.path[0]

from simpletuner.cli.main import INTERRUPTED, main  # noqa: E402


def command() -> None:
    """Run the process's own command line and end the process with its exit code."""
    code = main()
    if code in (STOPPED, INTERRUPTED):
        os._exit(code)  # without waiting for a download that was left behind
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)  # gloo's connections wait for ranks that are gone before they close
    sys.exit(code)


if __name__ == "__main__":
    command()
