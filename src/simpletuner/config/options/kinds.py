"""The frozen base class of option slices, and the types of their values.

Each type is a plain type with its range; `simpletuner.config.values` puts that range into words for an error message.
"""

import ast
import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BaseModel, ConfigDict


class Slice(BaseModel):
    """A frozen group of options. Unknown keys are rejected, and values are not converted."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        defer_build=True,
    )

    @classmethod
    def documentation(cls) -> dict[str, str]:
        """The docstring of each field, by the field's name.

        Reads the source on demand. Pydantic's `use_attribute_docstrings` would read it at every start, a third of the
        time that reporting a config error takes.
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
class Expects:
    """Describes the accepted values in messages, for an option whose type alone does not."""

    words: str
    near: tuple[str, ...] = ()
    """Candidates for "Did you mean …?", for an option without a plain list of choices."""


@dataclass(frozen=True)
class IsPath:
    """Marks a path: placeholders and `~` are filled in, and a relative path starts in the working folder."""


@dataclass(frozen=True)
class IsModel:
    """Marks a Hub id or a local path; only a local path is treated as `IsPath`."""


@dataclass(frozen=True)
class IsJson:
    """Marks a value that may also be given as inline JSON or as the path of a JSON file."""


def whole_as_text(value: object) -> object:
    """Convert an integer to text, for options where 1024 and "1024" mean the same; return other values unchanged."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def boolean_as_text(value: object) -> object:
    """Convert a boolean to text, for options where `true` and `"true"` mean the same; return other values unchanged."""
    return str(value).lower() if isinstance(value, bool) else value


def list_as_tuple(value: object) -> object:
    """Convert a JSON list to the tuple that a frozen slice holds; return other values unchanged."""
    return tuple(value) if isinstance(value, list) else value


def untyped_value(value: object) -> object:
    """The value of a key that has no declared type: text that looks like a boolean or a number is converted to one."""
    if not isinstance(value, str):
        return value
    if value in ("true", "false"):
        return value == "true"
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


Text = Annotated[str, MinLen(1)]
PathText = Annotated[str, MinLen(1), IsPath()]
ModelText = Annotated[str, MinLen(1), IsModel()]
Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
UnitInterval = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1), Expects("a whole number from 0 to 2^63 - 1")]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
