"""Whether the tests of this folder run on the CPU, to be tried out where there is no GPU."""

import os

DEVICE_VARIABLE = "PYTEST_SIMPLETUNER_DEVICE"
IS_REHEARSAL = os.environ.get(DEVICE_VARIABLE) == "cpu"
