"""Fuse LoRA factors of query, key and value into those of one matrix, as in BFL's layout, and split them again.

ΔW of the fused matrix concatenates the rows of its parts. Its factors are a block-diagonal b and the concatenated a of
the parts, so ranks add up. Parts that share one a, as after training on a fused matrix, concatenate their b and keep
the rank. Both are exact: `unfused` restores the bits of the input of `fused`.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from simpletuner.flux2.factors import Factors, LowRank
from simpletuner.flux2.names import to_bfl

FUSED_RANKS = "simpletuner.fused_ranks"
"""Header field of a file with fused matrices: JSON with the ranks of the parts, by BFL's name of the fused matrix. A
missing part has rank 0."""


def fused(parts: Sequence[LowRank | None]) -> LowRank:
    """The factors of the fused matrix of `parts`, which have equal numbers of rows; None stands for a part of zeros.

    Raises:
        ValueError: all parts are None, or one has a scale other than 1.
    """
    present = [part for part in parts if part is not None]
    if not present or any(part.scale != 1 for part in present):
        raise ValueError("only parts with their scale folded in can be fused, and at least one")
    a, (rows, rank) = present[0].a, present[0].b.shape
    if all(torch.equal(part.a, a) for part in present):
        zeros = present[0].b.new_zeros(rows, rank)
        return LowRank(a, torch.cat([zeros if part is None else part.b for part in parts]))
    absent = present[0].b.new_zeros(rows, 0)
    b = torch.block_diag(*[absent if part is None else part.b for part in parts])
    return LowRank(torch.cat([part.a for part in present]), b)


def fused_groups(modules: Mapping[str, object]) -> dict[str, list[str | None]]:
    """The names of `modules` that BFL's layout fuses, by BFL's name of the fused matrix.

    Each list has one entry for each part, in order; None for a part that `modules` lacks.
    """
    groups: dict[str, list[str | None]] = {}
    for name in modules:
        bfl_module = to_bfl(name)
        if bfl_module is not None and bfl_module.parts > 1:
            groups.setdefault(bfl_module.name, [None] * bfl_module.parts)[bfl_module.part] = name
    return groups


def fused_ranks(modules: Mapping[str, LowRank]) -> dict[str, list[int]]:
    """The value of `FUSED_RANKS` for a file that holds `modules` fused."""
    return {
        name: [0 if part is None else modules[part].rank for part in parts]
        for name, parts in fused_groups(modules).items()
    }


def unfused(modules: Mapping[str, Factors], header: Mapping[str, str]) -> dict[str, Factors]:
    """`modules`, with the parts of each fused matrix at the ranks that they had before `fused`.

    Parts of zeros are left out; modules that `fused` did not fuse stay unchanged. The ranks come from the header, else
    from exact zeros: a part's `b` is zero in the columns that belong to another part's `a`. Parts are reduced only if
    they share one `a` tensor, as parts from `LowRank.selected_rows` do.
    """
    recorded = _recorded(header)
    modules_at_own_ranks = dict(modules)
    for fused_name, names in fused_groups(modules).items():
        parts = [modules[name] for name in names if name is not None]
        factors = [part for part in parts if isinstance(part, LowRank)]
        if len(factors) < len(names) or any(part.a is not factors[0].a for part in factors):
            continue
        for name, part in zip(names, _at_own_ranks(factors, recorded.get(fused_name)), strict=True):
            assert name is not None
            if part is None:
                del modules_at_own_ranks[name]
            else:
                modules_at_own_ranks[name] = part
    return modules_at_own_ranks


def _at_own_ranks(parts: Sequence[LowRank], recorded: Sequence[int] | None) -> Sequence[LowRank | None]:
    """Reduce `parts`, which share one a, to their own ranks, if those can be determined."""
    a = parts[0].a
    used = [part.b.any(dim=0) for part in parts]
    if recorded is not None and len(recorded) == len(parts) and max(recorded) == len(a) != sum(recorded):
        # The parts had the same a before they were fused.
        is_consistent = all(rank or not columns.any() for rank, columns in zip(recorded, used, strict=True))
        return [part if rank else None for part, rank in zip(parts, recorded, strict=True)] if is_consistent else parts
    for ranks in _candidates(len(a), used, recorded):
        stops = list(itertools.accumulate(ranks))
        spans = [slice(stop - rank, stop) for stop, rank in zip(stops, ranks, strict=True)]
        if _is_block_diagonal(used, spans):
            return [
                LowRank(a[span].clone(), part.b[:, span].contiguous(), part.scale) if part.b[:, span].numel() else None
                for part, span in zip(parts, spans, strict=True)
            ]
    return parts


def _candidates(rank: int, used: Sequence[Tensor], recorded: Sequence[int] | None) -> Iterator[Sequence[int]]:
    """Yield possible ranks for the parts of a fused matrix of `rank`.

    First the recorded ranks, then equal ones, then those given by the last column of `b` that each part uses.
    """
    if recorded is not None:
        yield recorded
    if rank % len(used) == 0:
        yield [rank // len(used)] * len(used)
    stops = [0]
    for columns in used:
        stops.append(max(stops[-1], *(columns.nonzero().flatten() + 1).tolist(), 0))
    yield [stop - start for start, stop in itertools.pairwise(stops)]


def _is_block_diagonal(used: Sequence[Tensor], spans: Sequence[slice]) -> bool:
    """Whether `spans` cover all columns and each part uses only the columns of its span."""
    if len(spans) != len(used) or spans[-1].stop != len(used[0]):
        return False
    outside = torch.stack(list(used))
    for row, span in zip(outside, spans, strict=True):
        row[span] = False
    return not bool(outside.any())


def _recorded(header: Mapping[str, str]) -> dict[str, list[int]]:
    """The valid entries of the header's `FUSED_RANKS`. Without a valid entry, `unfused` relies on zeros in `b`."""
    try:
        listed = json.loads(header.get(FUSED_RANKS, "{}"))
    except (ValueError, RecursionError):
        return {}
    return {
        name: ranks
        for name, ranks in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(ranks, list) and ranks and all(type(rank) is int and 0 <= rank < 2**31 for rank in ranks)
    }
