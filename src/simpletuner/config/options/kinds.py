"""What every slice of options is made of: the frozen base class and the kinds of value an option takes.

A kind is a plain type with its range; `simpletuner.config.values` puts that range into words for an error.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BaseModel, ConfigDict


class Slice(BaseModel):
    """A frozen group of options. Unknown keys are refused, and nothing is converted on the way in."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        defer_build=True,
        use_attribute_docstrings=True,
    )


@dataclass(frozen=True)
class Says:
    """The words an error uses for what an option expects, where its type alone does not tell."""

    words: str


@dataclass(frozen=True)
class IsPath:
    """Marks a path: placeholders and `~` are filled in, a relative one starts in the working folder."""


@dataclass(frozen=True)
class IsModel:
    """Marks a Hub id or a local path; only the second is treated as a path."""


Text = Annotated[str, MinLen(1)]
PathText = Annotated[str, MinLen(1), IsPath()]
ModelText = Annotated[str, MinLen(1), IsModel()]
Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
