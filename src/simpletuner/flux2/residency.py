"""Choose which transformer blocks stay on the accelerator while the others are streamed."""

from collections.abc import Mapping
from functools import lru_cache

from simpletuner.config.flavours import TransformerSpec

BLOCK_LISTS: Mapping[str, bool] = {"transformer_blocks": True, "single_transformer_blocks": False}
"""Names of the module lists that hold the blocks, and whether those are double blocks."""


@lru_cache(maxsize=256)
def resident_indices(spec: TransformerSpec, count: int) -> frozenset[int]:
    """Indices of the `count` blocks to keep resident; all blocks if `count` exceeds their number.

    Double blocks are chosen first: a double block has twice the bytes of a single block for the same arithmetic, so
    its copy is the hardest to hide, and slots are as large as the largest streamed block. Within each kind the resident
    blocks are evenly spaced, so that preceding blocks' compute hides each copy. The figures are in
    docs/decisions/0019-resident-blocks.md.
    """
    doubles = min(count, spec.double_blocks)
    singles = min(count - doubles, spec.single_blocks)
    first = _spread(spec.double_blocks, doubles)
    return frozenset(first) | {spec.double_blocks + index for index in _spread(spec.single_blocks, singles)}


def _spread(total: int, count: int) -> list[int]:
    """Return `count` evenly spaced indices below `total`: the midpoints of `count` equal intervals."""
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def block_index(spec: TransformerSpec, name: str) -> int | None:
    """Index of the block that holds the tensor `name`, counting double blocks first; None if it is in no block."""
    blocks, _, name_in_list = name.partition(".")
    if blocks not in BLOCK_LISTS:
        return None
    index = int(name_in_list.partition(".")[0])
    return index if BLOCK_LISTS[blocks] else spec.double_blocks + index
