"""`simpletuner train`, sent a signal at a named moment: python interrupted.py SIGNAL PLACE:WHERE FLAGS…

PLACE is import, where the module WHERE is about to be imported for the first time, or one of those of `killed.py`.
"""

import importlib.abc
import runpy
import signal
import sys


class InterruptedImport(importlib.abc.MetaPathFinder):
    """Finds nothing; sends a signal when `module` is looked for, which is in the middle of whatever imports it."""

    def __init__(self, module: str, number: int) -> None:
        self.module = module
        self.number = number

    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname == self.module:
            sys.meta_path.remove(self)
            signal.raise_signal(self.number)


if __name__ == "__main__":
    number, moment = signal.Signals[sys.argv[1]], sys.argv[2]
    place, _, where = moment.partition(":")
    if place == "import":
        sys.meta_path.insert(0, InterruptedImport(where, number))
    else:
        import killed

        killed.die = lambda: signal.raise_signal(number)
        killed.arm(place, int(where))
    sys.argv = ["simpletuner", "train", *sys.argv[3:]]
    runpy.run_module("simpletuner", run_name="__main__")
