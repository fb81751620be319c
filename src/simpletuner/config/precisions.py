"""Table of the formats of quantized weights, and the library of each. Does not import torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

Library = Literal["optimum.quanto", "torchao", "bitsandbytes"]
"""A quantization library, by the name of its module."""

DISTRIBUTIONS: Mapping[Library, tuple[str, str]] = {
    "optimum.quanto": ("optimum-quanto", "0.2.7"),
    "torchao": ("torchao", "0.18"),
    "bitsandbytes": ("bitsandbytes", "0.50"),
}
"""Each library's distribution name on PyPI, and the lowest version that works."""


@dataclass(frozen=True)
class Precision:
    """A format of quantized weights."""

    library: Library
    """The library that quantizes to this format."""
    bits: int
    """Bits of a stored weight."""
    group: int | None = None
    """Number of weights in a row that share a scale; None if a whole row does."""
    needs_accelerator: bool = False
    """Whether the library computes with this format only on accelerators."""

    @property
    def distribution(self) -> str:
        """Distribution name of its library on PyPI."""
        return DISTRIBUTIONS[self.library][0]

    def unusable_reason(self) -> str | None:
        """Why the library is unusable on this machine; None if it is usable. Does not import it."""
        name, minimum = DISTRIBUTIONS[self.library]
        try:
            installed = version(name)
        except PackageNotFoundError:
            return f"{name} is not installed"
        fault = f"{name} is {installed}, and {minimum} or later is needed"
        return None if _numbers(installed) >= _numbers(minimum) else fault


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
"""Formats by the name that options use; "no_change" is not among them."""

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
"""Other programs' format names, each with the nearest formats here: those with as many bits per weight, else with the
next higher number."""
