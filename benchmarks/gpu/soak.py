"""Run the tests of tests/gpu, including the long ones, and report each as it ends.

    python benchmarks/gpu/soak.py [--quick] [--device cpu --tiny]

With `--device cpu` the tests run as their rehearsal (tests/gpu/conftest.py).
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import TextIO

import pytest
from measuring import Clock, parser
from results import report

ROOT = Path(__file__).resolve().parents[2]


class Reports:
    """Reports each test to `results`, past pytest's capture, and stops when no time is left."""

    def __init__(self, seconds: float, results: TextIO) -> None:
        self._clock = Clock(seconds)
        self._results = results

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort quick tests first, and of these the whole runs of the command last."""
        items.sort(key=lambda item: ("slow" in item.keywords, item.path.name == "test_command.py"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Report a test's call, and any other phase that did not pass."""
        if report.when == "call" or report.outcome != "passed":
            with contextlib.redirect_stdout(self._results):
                report_test(report)

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """End the session between two tests if no time is left."""
        if self._clock.left <= 0:
            item.session.shouldstop = "no time was left"


def report_test(test: pytest.TestReport) -> None:
    """Report a test as one row of the table."""
    note = "" if test.passed else test.longreprtext.strip().splitlines()[-1][:300]
    report("test", name=test.nodeid, outcome=test.outcome, seconds=test.duration, passed=not test.failed, note=note)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="leave out the long tests")
    given = arguments.parse_args()
    if given.device.type == "cpu":
        os.environ["PYTEST_SIMPLETUNER_DEVICE"] = "cpu"
    os.chdir(ROOT)
    chosen = ["-m", "not slow" if given.quick else "", "--tb=short", "tests/gpu"]
    # stdout is for results.
    with open(os.dup(1), "w", encoding="utf-8") as results:
        os.dup2(2, 1)
        code = pytest.main(chosen, plugins=[Reports(given.seconds, results)])
    # A test that did not run has not failed. Each failed test has a row of its own.
    return 0 if code == pytest.ExitCode.INTERRUPTED else int(code)


if __name__ == "__main__":
    sys.exit(main())
