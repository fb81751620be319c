"""Which blocks stay on the accelerator: double blocks first, evenly spread."""

import itertools

import pytest
import torch

from simpletuner.config.flavours import DEV, TINY
from simpletuner.flux2.residency import block_index, resident_indices
from simpletuner.flux2.transformer import Flux2Transformer


@pytest.mark.parametrize("count", range(60))
def test_there_are_as_many_as_asked_for_double_blocks_first(count: int) -> None:
    found = resident_indices(DEV, count)
    assert len(found) == min(count, 56)
    assert sum(index < DEV.double_blocks for index in found) == min(count, DEV.double_blocks)


@pytest.mark.parametrize("count", range(8, 57))
def test_streamed_single_blocks_have_equal_stretches_between_them(count: int) -> None:
    streamed = [index for index in range(8, 56) if index not in resident_indices(DEV, count)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(streamed)]
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_a_tensor_belongs_to_the_block_that_its_name_says() -> None:
    with torch.device("meta"):
        transformer = Flux2Transformer(TINY)
    owners = {id(tensor): index for index, block in enumerate(transformer.blocks) for tensor in block.parameters()}
    found = {id(tensor): block_index(TINY, name) for name, tensor in transformer.named_parameters()}
    assert {place: index for place, index in found.items() if index is not None} == owners
