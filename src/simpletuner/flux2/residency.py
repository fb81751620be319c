"""Which blocks of a transformer stay on the accelerator while the others are streamed."""

from collections.abc import Mapping
from functools import lru_cache

from simpletuner.config.flavours import TransformerSpec

BLOCK_LISTS: Mapping[str, bool] = {"transformer_blocks": True, "single_transformer_blocks": False}
"""The module lists of the blocks, and whether their blocks are double blocks."""


@lru_cache(maxsize=256)
def resident_indices(spec: TransformerSpec, count: int) -> frozenset[int]:
    """Indices of `count` blocks, double blocks first; of all, where there are fewer.

    A double block has twice the bytes of a single block for the same arithmetic, so its copy is the hardest to hide,
    and slots are as wide as the widest streamed block. Within a kind the resident blocks are spread evenly, so that
    each copy has the compute of those before it to hide behind. Counted in docs/decisions/0019-resident-blocks.md.
    """
    doubles = min(count, spec.double_blocks)
    singles = min(count - doubles, spec.single_blocks)
    first = _spread(spec.double_blocks, doubles)
    return frozenset(first) | {spec.double_blocks + index for index in _spread(spec.single_blocks, singles)}


def _spread(of: int, count: int) -> list[int]:
    """`count` of `of` indices, in the middles of equal stretches."""
    return [(2 * index + 1) * of // (2 * count) for index in range(count)]


def block_index(spec: TransformerSpec, name: str) -> int | None:
    """The index among all blocks, doubles first, of the block to which the tensor of this name belongs."""
    blocks, _, rest = name.partition(".")
    if blocks not in BLOCK_LISTS:
        return None
    index = int(rest.partition(".")[0])
    return index if BLOCK_LISTS[blocks] else spec.double_blocks + index
