"""LoRA factors of query, key and value joined into those of one fused matrix, as BFL's layout has it, and back.

ΔW of the fused matrix has the rows of its parts one below the other. Its factors are b block-diagonal and the parts' a
stacked, at the sum of their ranks; where the parts share one a, as they do after training on a fused matrix, the b are
stacked and the rank stays. Both are exact: `unfused` returns the bits of what `fused` was given.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from simpletuner.flux2.factors import Factors, LowRank
from simpletuner.flux2.names import to_bfl

FUSED_RANKS = "simpletuner.fused_ranks"
"""Header field of a file with fused matrices: JSON, the ranks of the parts by the fused matrix's name in BFL's layout;
0 for a part that the adapter does not have."""


def fused(parts: Sequence[LowRank | None]) -> LowRank:
    """The factors of the matrix that `parts` are the rows of, each with the same number; None is a part of zeros.

    Raises:
        ValueError: no part is there, or one has a scale other than 1.
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
    """The names of `modules` that BFL's layout fuses, by its name for the fused matrix: one for each part, in order;
    None for a part that is not among them.
    """
    groups: dict[str, list[str | None]] = {}
    for name in modules:
        place = to_bfl(name)
        if place is not None and place.parts > 1:
            groups.setdefault(place.name, [None] * place.parts)[place.part] = name
    return groups


def fused_ranks(modules: Mapping[str, LowRank]) -> dict[str, list[int]]:
    """What `FUSED_RANKS` says of a file that holds `modules` fused."""
    return {
        name: [0 if part is None else modules[part].rank for part in parts]
        for name, parts in fused_groups(modules).items()
    }


def unfused(modules: Mapping[str, Factors], header: Mapping[str, str]) -> dict[str, Factors]:
    """`modules`, with the parts of each fused matrix at the ranks that they had before `fused`; a part of zeros is left
    out. What was not fused by it stays as it is.

    The ranks are those of the header, else they show in `b`: exact zeros where one part has nothing to do with the a
    of another. Parts are cut only where they share one `a` tensor, as those that `LowRank.taken` returns do.
    """
    recorded = _recorded(header)
    found = dict(modules)
    for fused_name, names in fused_groups(modules).items():
        parts = [modules[name] for name in names if name is not None]
        factors = [part for part in parts if isinstance(part, LowRank)]
        if len(factors) < len(names) or any(part.a is not factors[0].a for part in factors):
            continue
        for name, part in zip(names, _cut(factors, recorded.get(fused_name)), strict=True):
            assert name is not None
            if part is None:
                del found[name]
            else:
                found[name] = part
    return found


def _cut(parts: Sequence[LowRank], recorded: Sequence[int] | None) -> Sequence[LowRank | None]:
    """Cut `parts`, which share one a, to their own ranks, if there are such ranks."""
    a = parts[0].a
    used = [part.b.any(dim=0) for part in parts]
    if recorded is not None and len(recorded) == len(parts) and max(recorded) == len(a) != sum(recorded):
        # The parts had the same a.
        is_whole = all(rank or not columns.any() for rank, columns in zip(recorded, used, strict=True))
        return [part if rank else None for part, rank in zip(parts, recorded, strict=True)] if is_whole else parts
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
    """Ranks that the parts of a fused matrix of `rank` may have had: the recorded ones, equal ones, and those that the
    last column of `b` that each part uses tells.
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
    """Whether `spans` cover all columns, and each part uses those of its own span alone."""
    if len(spans) != len(used) or spans[-1].stop != len(used[0]):
        return False
    outside = torch.stack(list(used))
    for row, span in zip(outside, spans, strict=True):
        row[span] = False
    return not bool(outside.any())


def _recorded(header: Mapping[str, str]) -> dict[str, list[int]]:
    """The readable entries of the header's `FUSED_RANKS`: a damaged one tells nothing, and the zeros remain."""
    try:
        listed = json.loads(header.get(FUSED_RANKS, "{}"))
    except (ValueError, RecursionError):
        return {}
    return {
        name: ranks
        for name, ranks in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(ranks, list) and ranks and all(type(rank) is int and 0 <= rank < 2**31 for rank in ranks)
    }
