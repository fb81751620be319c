"""Shapes are checked while tests run, wherever a signature has some."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from tests.shapes import has_shape

Rows = Float[np.ndarray, "n 2"]


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (Rows, True),
        (Rows | None, True),
        (tuple[int, list[Rows]], True),
        ("Rows", True),
        (Callable[[Rows], Rows], False),
        (np.ndarray, False),
        (list[int] | None, False),
        (Literal["full", "own"], False),
    ],
    ids=str,
)
def test_what_has_a_shape(annotation: object, expected: bool) -> None:
    assert has_shape(annotation) == expected


def test_functions_and_dataclasses_with_shapes_are_checked_and_others_left_alone() -> None:
    import jaxtyping
    from beartype import beartype

    checked = jaxtyping.jaxtyped(typechecker=beartype)

    def sums(rows: Rows) -> float:
        return float(rows.sum())

    def count(rows: int) -> int:
        return rows

    @checked
    @dataclass
    class Table:
        rows: Rows

    @checked
    @dataclass
    class Wider(Table):
        width: int = 2

    assert checked(count) is count
    assert checked(sums)(np.ones((3, 2))) == 6
    wrong = np.ones((3, 3))
    for call in (checked(sums), Table, Wider):
        with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
            call(wrong)


def test_a_type_that_is_only_named_need_not_be_there() -> None:
    import jaxtyping
    from beartype import beartype

    checked = jaxtyping.jaxtyped(typechecker=beartype)

    @checked
    def of_rows(rows: Rows) -> "NowhereDefined":  # type: ignore[name-defined]
        return rows.sum()

    assert of_rows(np.ones((3, 2))) == 6
    with pytest.raises(TypeCheckError):
        of_rows(np.ones((3, 3)))


def test_what_is_returned_has_the_sizes_that_the_parameters_bind() -> None:
    import jaxtyping
    from beartype import beartype

    checked = jaxtyping.jaxtyped(typechecker=beartype)

    @checked
    def scaled(rows: Rows, start: int = 0) -> Rows:
        return rows[start:]

    @checked
    def outer(rows: Rows) -> float:
        return float(scaled(rows[:1]).sum()) + float(scaled(rows).sum())  # a call inside another binds its own sizes

    assert outer(np.ones((3, 2))) == 8
    with pytest.raises(
        BeartypeCallHintViolation, match="dimension n is 2 which does not equal the existing value of 3"
    ):
        scaled(np.ones((3, 2)), start=1)


def test_the_rooms_are_checked() -> None:
    import torch

    from simpletuner.flow.sampler import euler

    with pytest.raises(BeartypeCallHintViolation):
        euler(lambda x, _sigma: x, torch.zeros(1, 2, 3), torch.ones(2, 1))
