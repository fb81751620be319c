"""What every slice of options is made of: the frozen base class and the kinds of value an option takes.

A kind is a plain type with its range; `simpletuner.config.values` puts that range into words for an error.
"""

import ast
import inspect
from dataclasses import dataclass
from itertools import pairwise
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
    )

    @classmethod
    def documentation(cls) -> dict[str, str]:
        """The text under each field, by the field's name.

        Read from the source on demand: pydantic's `use_attribute_docstrings` reads it on every start, which
        would be a third of the time that a mistake in a config takes to be answered.
        """
        if cls is Slice:
            return {}
        inherited = {
            name: text
            for base in cls.__bases__
            if issubclass(base, Slice)
            for name, text in base.documentation().items()
        }
        (definition,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(definition, ast.ClassDef)
        return inherited | {
            field.target.id: inspect.cleandoc(text.value.value)
            for field, text in pairwise(definition.body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }


@dataclass(frozen=True)
class Says:
    """The words an error uses for what an option expects, where its type alone does not tell."""

    words: str
    near: tuple[str, ...] = ()
    """Names of which the nearest is suggested, where the values are more than a list."""


@dataclass(frozen=True)
class IsPath:
    """Marks a path: placeholders and `~` are filled in, a relative one starts in the working folder."""


@dataclass(frozen=True)
class IsModel:
    """Marks a Hub id or a local path; only the second is treated as a path."""


@dataclass(frozen=True)
class IsJson:
    """Marks a value that may also be typed as inline JSON or as the path of a JSON file."""


def whole_as_text(value: object) -> object:
    """A whole number as its text, where 1024 and "1024" are to mean the same; anything else as it is."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def boolean_as_text(value: object) -> object:
    """A boolean as its text, where `true` and `"true"` are to mean the same; anything else as it is."""
    return str(value).lower() if isinstance(value, bool) else value


def list_as_tuple(value: object) -> object:
    """A list, as JSON has it, as a tuple, as a frozen slice has it; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


Text = Annotated[str, MinLen(1)]
PathText = Annotated[str, MinLen(1), IsPath()]
ModelText = Annotated[str, MinLen(1), IsModel()]
Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
UnitInterval = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1), Says("a whole number from 0 to 2^63 - 1")]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
