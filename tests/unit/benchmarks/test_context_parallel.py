"""The trial of context parallelism stays exact over the program's own transformer."""

import sys
from pathlib import Path

import pytest
from tests.ranks import together

CASES = ("255 image and 61 text tokens", "a sharded base", "references that see their own")
SCRIPT = Path(__file__).parents[3] / "benchmarks/context_parallel.py"


@pytest.mark.slow
def test_two_ranks_that_share_a_sample_agree_with_one_process() -> None:
    """The script ends with an error where a loss or gradient is off by more than its limit."""
    first, second = together(2, [sys.executable, str(SCRIPT), *(f"--case={name}" for name in CASES)])
    assert (first.exit_code, second.exit_code) == (0, 0), first.err + second.err
    assert [row.partition("  ")[0] for row in first.out.splitlines()] == list(CASES)
    assert second.out == ""
