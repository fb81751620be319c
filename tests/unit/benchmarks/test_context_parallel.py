"""The trial of context parallelism stays exact over the program's own transformer."""

import sys
from pathlib import Path

import pytest
from tests.ranks import together

SCRIPT = Path(__file__).parents[3] / "benchmarks/context_parallel.py"


@pytest.mark.slow
def test_two_ranks_that_share_a_sample_agree_with_one_process() -> None:
    """The script ends with an error where a loss or gradient is off by more than its limit."""
    first, second = together(2, [sys.executable, str(SCRIPT)])
    assert (first.exit_code, second.exit_code) == (0, 0), first.err + second.err
    rows = first.out.splitlines()
    assert len(rows) == 8
    assert all("off by: loss" in row for row in rows)
    assert second.out == ""
