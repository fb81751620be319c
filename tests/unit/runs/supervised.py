"""A supervisor in a process of its own: python supervised.py SIZE RUN COMMAND…"""

import os
import sys
from pathlib import Path

from simpletuner.base.signals import deferred_signals
from simpletuner.runs import ranks
from simpletuner.runs.layout import RunDirectory

if __name__ == "__main__":
    ranks.LEAVE_S = 0.3
    with deferred_signals:
        code = ranks.Supervisor(int(sys.argv[1]), RunDirectory(Path(sys.argv[2])))(sys.argv[3:], os.environ)
    sys.exit(code)
