"""A rank without a model: python rank_program.py CODE, which is run with the names of this module."""

import os
import signal
import sys
import time

from simpletuner.base.errors import DataError, RanksError, Stopped, UserError
from simpletuner.base.signals import deferred_signals
from simpletuner.runs import ranks
from simpletuner.runs.events import EventLog, PhaseEvent
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.ranks import as_rank, read_rank_place

__all__ = ["DataError", "EventLog", "PhaseEvent", "RanksError", "RunDirectory", "Stopped", "signal", "sys"]


def wait_for_others() -> None:
    """A barrier that nobody comes to."""
    while True:
        place.errors.check()
        time.sleep(0.02)


if __name__ == "__main__":
    code = 0
    ranks.BLAME_PATIENCE_S = 0.3
    with deferred_signals:
        place = read_rank_place(os.environ)
        rank = place.rank
        try:
            with as_rank(place):
                exec(sys.argv[1])
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            code = error.exit_code
    os._exit(code)
