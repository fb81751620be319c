"""Factors of query, key and value go into one matrix and come back with their bits."""

import json
from collections.abc import Mapping

import pytest
import torch

from simpletuner.flux2.factors import LowRank
from simpletuner.flux2.fused import FUSED_RANKS, fused, fused_ranks, unfused

NAMES = tuple(f"transformer_blocks.3.attn.to_{part}" for part in "qkv")
FUSED = "double_blocks.3.img_attn.qkv"
ROWS, COLUMNS = 6, 5


def part(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, COLUMNS, generator=generator), torch.randn(ROWS, rank, generator=generator)
    return LowRank(a.to(dtype), b.to(dtype))


def as_read(whole: LowRank) -> dict[str, LowRank]:
    """As a reader cuts a fused matrix: each part has its rows, and the whole `a`."""
    return {name: whole.selected_rows([(ROWS * at, ROWS * (at + 1))]) for at, name in enumerate(NAMES)}


def assert_same(found: Mapping[str, object], expected: Mapping[str, LowRank]) -> None:
    assert found.keys() == expected.keys()
    for name, factors in expected.items():
        own = found[name]
        assert isinstance(own, LowRank)
        assert torch.equal(own.a, factors.a), name
        assert torch.equal(own.b, factors.b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_header", [True, False])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 1, 1), (2, 5, 1), (4, 0, 4), (0, 3, 0), (0, 0, 6)])
def test_parts_come_back_with_their_bits(ranks: tuple[int, ...], with_header: bool, dtype: torch.dtype) -> None:
    """At any ranks, with parts missing; with the ranks in the header, and by the exact zeros alone."""
    parts = {name: part(rank, seed, dtype) for seed, (name, rank) in enumerate(zip(NAMES, ranks, strict=True)) if rank}
    whole = fused([parts.get(name) for name in NAMES])
    assert whole.rank == sum(ranks)
    expected = torch.cat([parts[name].delta() if name in parts else torch.zeros(ROWS, COLUMNS) for name in NAMES])
    assert torch.allclose(whole.delta(), expected, atol=1e-6)
    assert fused_ranks(parts) == {FUSED: list(ranks)}
    header = {FUSED_RANKS: json.dumps({FUSED: ranks})} if with_header else {}
    assert_same(unfused(as_read(whole), header), parts)


@pytest.mark.parametrize("absent", [(), (1,), (0, 2)])
def test_parts_that_share_a_keep_their_rank(absent: tuple[int, ...]) -> None:
    first = part(4, 0)
    parts = {name: LowRank(first.a, part(4, seed).b) for seed, name in enumerate(NAMES) if seed not in absent}
    whole = fused([parts.get(name) for name in NAMES])
    assert whole.rank == 4
    found = unfused(as_read(whole), {FUSED_RANKS: json.dumps(fused_ranks(parts))})
    assert_same(found, parts)


@pytest.mark.parametrize(
    "damaged",
    ["", "no JSON", "[1]", "7", json.dumps({FUSED: [1, 2, 99]}), json.dumps({FUSED: "4"}), json.dumps({FUSED: [-4, 8]})]
    + [json.dumps({FUSED: ranks}) for ranks in ([12, 0, 0], [0, 12, 0], [], [4, 4], [4, 4, 4.0], [None], [2, 5, 5])],
)
def test_a_damaged_header_changes_nothing(damaged: str) -> None:
    """Ranks that would lose a number are not believed: what the zeros show remains."""
    parts = {name: part(4, seed) for seed, name in enumerate(NAMES)}
    whole = fused(list(parts.values()))
    assert_same(unfused(as_read(whole), {FUSED_RANKS: damaged}), parts)


def test_what_was_trained_fused_stays_whole() -> None:
    """No zeros: nothing may be cut, whatever a header says."""
    whole = LowRank(torch.randn(6, COLUMNS), torch.randn(3 * ROWS, 6))
    read = as_read(whole)
    for header in ({}, {FUSED_RANKS: json.dumps({FUSED: [2, 2, 2]})}, {FUSED_RANKS: json.dumps({FUSED: [6, 0, 6]})}):
        assert_same(unfused(read, header), read)


def test_an_untrained_fused_matrix_keeps_its_modules() -> None:
    """Zeros everywhere tell no ranks but equal ones."""
    for rank, expected in ((6, 2), (4, 4)):
        read = as_read(LowRank(torch.randn(rank, COLUMNS), torch.zeros(3 * ROWS, rank)))
        found = unfused(read, {})
        assert [factors.rank for factors in found.values() if isinstance(factors, LowRank)] == [expected] * 3


def test_parts_that_were_stored_alone_are_left_alone() -> None:
    """A file in diffusers' names holds each `a` by itself, equal or not, and comes back as it is."""
    a = torch.randn(3, COLUMNS)
    parts = {name: LowRank(a.clone(), torch.zeros(ROWS, 3)) for name in NAMES}
    assert unfused(parts, {}) == parts


def test_only_folded_parts_are_fused() -> None:
    with pytest.raises(ValueError, match="folded"):
        fused([LowRank(torch.ones(1, COLUMNS), torch.ones(ROWS, 1), 0.5), None, None])
    with pytest.raises(ValueError, match="at least one"):
        fused([None, None, None])
