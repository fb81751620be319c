"""A supervisor in a process of its own: python supervised.py SIZE RUN COMMAND…

With MACHINE, MACHINES and PORT in its environment it is that of one of several machines, which meet on loopback.
"""

import os
import sys
from pathlib import Path

from simpletuner.base.signals import deferred_signals
from simpletuner.runs import machines, ranks
from simpletuner.runs.layout import RunDirectory

if __name__ == "__main__":
    ranks.LEAVE_S = 0.3
    ranks.GRACE_S = 2.0
    ranks.REST_S = 0.3
    with deferred_signals:
        met = None
        if "MACHINE" in os.environ:
            machines._address = lambda host: host
            number, count, port = (int(os.environ[name]) for name in ("MACHINE", "MACHINES", "PORT"))
            met = machines.meet(number, count, "127.0.0.1", port, {}, 20)
            met.timeout_s = 2
        code = ranks.Supervisor(int(sys.argv[1]), RunDirectory(Path(sys.argv[2])), met)(sys.argv[3:], os.environ)
    sys.exit(code)
