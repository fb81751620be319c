"""Quantised weights of frozen Linears, whichever library makes them, behind one call."""

from simpletuner.config.precisions import NO_CHANGE, PRECISIONS

GROUPS = (128, 64, 32)
"""Sizes of a group of weights that share a scale, the best for memory first."""

_NESTED = 256
"""Scales of nf4 that share a scale of their own."""


def stored_bytes(shape: tuple[int, int], precision: str, itemsize: int) -> int:
    """Bytes of a Linear's weight of `shape` (outputs, inputs) in `precision`, with all that is needed to read it; plain
    ones are of `itemsize` bytes each. Exact: the tests hold it against the tensors themselves.

    Raises:
        ValueError: the shape cannot be held in groups.
    """
    rows, columns = shape
    count = rows * columns
    if precision == NO_CHANGE:
        return count * itemsize
    known = PRECISIONS[precision]
    if precision == "nf4-bnb":
        # Blocks run on over the ends of rows. Their scales are bytes themselves, with a scale for 256 and one offset.
        blocks = _up(count, 64)
        return _up(count, 2) + blocks + 4 * _up(blocks, _NESTED) + 4
    if known.group is None:
        scale = itemsize if known.library == "optimum.quanto" else 4
        return count + rows * scale
    group = group_size(columns)
    if group is None:
        raise ValueError(f"{columns} inputs are no multiple of {GROUPS[-1]}")
    groups = count // group
    per_byte = 8 // known.bits
    # Scale and shift, or scale and a zero point of a byte.
    each = 2 * itemsize if known.library == "optimum.quanto" else itemsize + 1
    return _up(groups, per_byte) * group + groups * each


def group_size(columns: int) -> int | None:
    """Inputs of a Linear that share a scale, where groups do; None where no size divides them."""
    return next((size for size in GROUPS if columns % size == 0), None)


def _up(count: int, unit: int) -> int:
    return -(-count // unit)
