"""Work ahead: in order, bounded, and an error ends it."""

import threading
from contextlib import closing

import pytest

from simpletuner.data.ahead import prefetched_map


def test_results_come_in_order() -> None:
    assert list(prefetched_map(lambda n: n * n, range(100), workers=4, ahead=8)) == [n * n for n in range(100)]
    assert list(prefetched_map(str, [], workers=1, ahead=1)) == []


def test_no_more_than_asked_for_is_started() -> None:
    started: list[int] = []
    results = prefetched_map(started.append, range(100), workers=2, ahead=3)
    with closing(results):
        for taken in range(1, 20):
            next(results)
            assert len(started) <= taken + 3


def test_an_error_comes_in_its_place_and_ends_the_rest() -> None:
    gate = threading.Event()
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise ValueError("two")
        if number > 2:
            gate.wait(5)
        return number

    results = prefetched_map(work, range(1000), workers=1, ahead=50)
    assert [next(results), next(results)] == [0, 1]
    gate.set()
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert len(begun) < 100
