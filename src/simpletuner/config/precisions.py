"""The formats of quantized weights by name, and the library that makes each. Known before torch is imported."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

Library = Literal["optimum.quanto", "torchao", "bitsandbytes"]
"""By the module that is imported."""

DISTRIBUTIONS: Mapping[Library, tuple[str, str]] = {
    "optimum.quanto": ("optimum-quanto", "0.2.7"),
    "torchao": ("torchao", "0.18"),
    "bitsandbytes": ("bitsandbytes", "0.50"),
}
"""What pip calls it, and the first version that will do."""


@dataclass(frozen=True)
class Precision:
    """One format of weights."""

    library: Library
    """Which makes it."""
    bits: int
    """Of a stored weight."""
    group: int | None = None
    """Weights of a row that share a scale; None where a whole row does."""
    needs_accelerator: bool = False
    """Whether its library computes with it on accelerators only."""

    @property
    def distribution(self) -> str:
        """Its library, as pip calls it."""
        return DISTRIBUTIONS[self.library][0]

    def lack(self) -> str | None:
        """What is wrong with the library on this machine, in words; it is not imported."""
        name, first = DISTRIBUTIONS[self.library]
        try:
            found = version(name)
        except PackageNotFoundError:
            return f"{name} is not installed"
        return None if _numbers(found) >= _numbers(first) else f"{name} is {found}, and {first} or later is needed"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


PRECISIONS: Mapping[str, Precision] = {
    "int8-quanto": Precision("optimum.quanto", 8),
    "int4-quanto": Precision("optimum.quanto", 4, group=128),
    "int2-quanto": Precision("optimum.quanto", 2, group=128),
    "fp8-quanto": Precision("optimum.quanto", 8),
    "int8-torchao": Precision("torchao", 8),
    "int4-torchao": Precision("torchao", 4, group=128, needs_accelerator=True),
    "fp8-torchao": Precision("torchao", 8, needs_accelerator=True),
    "fp8wo-torchao": Precision("torchao", 8),
    "nf4-bnb": Precision("bitsandbytes", 4, group=64),
    "int8-bnb": Precision("bitsandbytes", 8),
}
"""By the name that options have for it; "no_change" is none of them."""

NO_CHANGE = "no_change"

_INT8 = ("int8-quanto", "int8-torchao", "int8-bnb")
_FP8 = ("fp8-quanto", "fp8wo-torchao")
_INT4 = ("int4-quanto", "nf4-bnb")

PRECISIONS_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("int8", "int8-sdnq", "uint8-sdnq", "int8dq-torchao", "uint8"), _INT8),
    **dict.fromkeys(("int7-sdnq", "int6-sdnq", "uint6-sdnq", "int5-sdnq", "uint5-sdnq"), _INT8),
    **dict.fromkeys(("int4", "int4-sdnq", "uint4-sdnq", "int3-sdnq", "uint3-sdnq", "uint4", "uint3"), _INT4),
    **dict.fromkeys(("nf4", "fp4-bnb", "int4-bnb"), ("nf4-bnb",)),
    **dict.fromkeys(("int2", "int2-sdnq", "uint2-sdnq", "uint2"), ("int2-quanto",)),
    **dict.fromkeys(("fp8", "fp8-sdnq", "fp8uz-quanto", "float8", "qfloat8"), _FP8),
    **dict.fromkeys(("bf16", "fp16-sdnq", "int16-sdnq", "uint16-sdnq", "none"), (NO_CHANGE,)),
}
"""Names of formats that other programs have, with those of ours that are nearest: as many bits a weight, or the next
more."""
