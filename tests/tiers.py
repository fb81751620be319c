"""Which cases of a parametrized test run in the quick tier."""

from collections.abc import Iterable
from typing import Any

import pytest


def others_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """`cases` of one parameter, with all but those equal to one of `quick` marked slow.

    Raises:
        ValueError: one of `quick` is no case.
    """
    cases = list(cases)
    if missing := [case for case in quick if case not in cases]:
        raise ValueError(f"no such cases: {missing}")
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
