"""Quantised weights of frozen Linears, whichever library makes them, behind one call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Library = Literal["quanto", "torchao", "bitsandbytes"]


@dataclass(frozen=True)
class Precision:
    """One format of weights."""

    library: Library
    bits: int
    """Of a stored weight."""
    group: int | None
    """Weights of a row that share a scale; None where a whole row does."""


PRECISIONS: Mapping[str, Precision] = {
    "int8-quanto": Precision("quanto", 8, None),
    "int4-quanto": Precision("quanto", 4, 128),
    "int2-quanto": Precision("quanto", 2, 128),
    "fp8-quanto": Precision("quanto", 8, None),
    "int8-torchao": Precision("torchao", 8, None),
    "int4-torchao": Precision("torchao", 4, 128),
    "fp8-torchao": Precision("torchao", 8, None),
    "fp8wo-torchao": Precision("torchao", 8, None),
    "nf4-bnb": Precision("bitsandbytes", 4, 64),
    "int8-bnb": Precision("bitsandbytes", 8, None),
}
"""By the name that options have for it; "no_change" is none of them."""
