"""Shapes are checked while tests run, wherever a signature has some."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
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
        with pytest.raises(TypeCheckError):
            call(wrong)


def test_the_rooms_are_checked() -> None:
    import torch

    from simpletuner.flow.sampler import euler

    with pytest.raises(TypeCheckError):
        euler(lambda x, _sigma: x, torch.zeros(1, 2, 3), torch.ones(2, 1))
