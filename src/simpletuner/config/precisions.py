"""The formats of quantised weights by name, and the library that makes each. Known before torch is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

Library = Literal["optimum.quanto", "torchao", "bitsandbytes"]


@dataclass(frozen=True)
class Precision:
    """One format of weights."""

    library: Library
    """The module that makes it."""
    bits: int
    """Of a stored weight."""
    group: int | None = None
    """Weights of a row that share a scale; None where a whole row does."""
    needs_accelerator: bool = False
    """Whether its library computes with it on accelerators only."""

    @property
    def is_installed(self) -> bool:
        package, _, _ = self.library.partition(".")
        # `optimum` is a folder that several distributions share.
        return find_spec(package) is not None and find_spec(self.library) is not None


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
