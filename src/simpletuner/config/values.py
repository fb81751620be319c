"""One option's value: what its type expects in words, text as a value, a value as text, the nearest name."""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from simpletuner.config.options.kinds import IsJson, IsModel, IsPath, Says, Slice

_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LONGEST_SHOWN = 80


@dataclass(frozen=True)
class OptionType:
    """The kind of value an option takes."""

    base: Any
    """bool, int, float or str; anything else for a structure."""

    choices: tuple[str, ...]
    """The values of an enumeration; empty for other kinds."""

    expects: str
    """In words: "a number above 0", "all, attention, mlp or tiny"."""

    is_path: bool
    is_model: bool
    is_json: bool
    near: tuple[str, ...] = ()
    """Names of which the nearest is suggested for a value that is not accepted."""

    minimum: float | None = None
    """The lower bound of a number; `expects` says whether it is allowed itself."""

    maximum: float | None = None


def join_names(names: Iterable[str], word: str = "or") -> str:
    """ "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def no_effect(keys: Sequence[str], reason: str) -> str:
    """The notice that `keys` were typed for nothing."""
    return f"{join_names(keys, 'and')} {'has' if len(keys) == 1 else 'have'} no effect: {reason}."


def _unwrapped(annotation: Any, marks: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """The bare type under `Annotated` and `| None`, and all marks found on the way."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _unwrapped(inner, (*marks, *more))
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return _unwrapped(members[0], marks)
    return annotation, tuple(marks)


def _in_words(base: Any, marks: Sequence[Any]) -> str:
    for mark in marks:
        if isinstance(mark, Says):
            return mark.words
    if base is bool:
        return "true or false"
    if get_origin(base) is Literal:
        return join_names(get_args(base))
    if base is str:
        is_model = any(isinstance(mark, IsModel) for mark in marks)
        is_path = any(isinstance(mark, IsPath) for mark in marks)
        return "a Hub id or a path" if is_model else "a path" if is_path else "text"
    noun = "a whole number" if base is int else "a number"
    low = [mark.ge for mark in marks if isinstance(mark, Ge)]
    above = [mark.gt for mark in marks if isinstance(mark, Gt)]
    high = [mark.le for mark in marks if isinstance(mark, Le)]
    below = [mark.lt for mark in marks if isinstance(mark, Lt)]
    if low and high:
        return f"{noun} from {low[0]} to {high[0]}"
    bounds = (
        [f"of at least {bound}" for bound in low]
        + [f"above {bound}" for bound in above]
        + [f"up to {bound}" for bound in high]
        + [f"below {bound}" for bound in below]
    )
    return " ".join((noun, " and ".join(bounds))) if bounds else noun


def _bound(bounds: Sequence[Any]) -> float | None:
    return next((bound for bound in bounds if isinstance(bound, int | float)), None)


def _kind(field: FieldInfo) -> OptionType:
    base, marks = _unwrapped(field.annotation, field.metadata)
    is_choice = get_origin(base) is Literal
    choices = get_args(base) if is_choice else ()
    return OptionType(
        base=str if is_choice else base,
        choices=choices,
        expects=_in_words(base, marks),
        is_path=any(isinstance(mark, IsPath) for mark in marks),
        is_model=any(isinstance(mark, IsModel) for mark in marks),
        is_json=any(isinstance(mark, IsJson) for mark in marks),
        near=next((mark.near for mark in marks if isinstance(mark, Says) and mark.near), choices),
        minimum=_bound([mark.ge if isinstance(mark, Ge) else mark.gt for mark in marks if isinstance(mark, Ge | Gt)]),
        maximum=_bound([mark.le if isinstance(mark, Le) else mark.lt for mark in marks if isinstance(mark, Le | Lt)]),
    )


@cache
def kinds(model: type[Slice]) -> dict[str, OptionType]:
    """The kind of every field of `model`, in the order of its declaration."""
    return {name: _kind(field) for name, field in model.model_fields.items()}


def from_text(text: str, kind: OptionType) -> object:
    """The value that `text`, from a flag or the environment, stands for. Text that is no such value comes
    back as it is, for the check to refuse."""
    if kind.base is int and _INTEGER.fullmatch(text):
        return int(text)
    if kind.base is float and _NUMBER.fullmatch(text):
        return float(text)
    return from_file(text, kind)


def from_file(value: object, kind: OptionType) -> object:
    """What `value`, from a file, stands for: "true" and "false" are booleans where one is expected."""
    if kind.base is bool and value in ("true", "false"):
        return value == "true"
    if kind.is_json and isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def is_quoted_number(value: object, kind: OptionType) -> bool:
    """Whether `value` would be right if it stood without quotes."""
    return isinstance(value, str) and kind.base in (int, float) and from_text(value, kind) is not value


def shown(value: object) -> str:
    """`value` as a person would type it, cut where it is long: 'al', -1, true, {"a": 1}."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


_FILLERS = frozenset({"a", "as", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"})
"""Words of a name that its meaning does not depend on."""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that means the same as `name`, which differs from it by a slip of the fingers.

    Digits are never a slip: `adamw4bit` is not `adamw8bit`. Long names have room for two, others for one:
    `precision` is not `revision`.
    """
    typed = _words_joined(name)
    slips = {other: _slips(typed, _words_joined(other)) for other in names}
    most = 0 if len(typed) < 3 else 1 if len(typed) <= 10 else 2
    close = [other for other, count in slips.items() if count <= most]
    same_digits = [other for other in close if _digits(other) == _digits(name)]
    return min(same_digits, key=lambda other: slips[other], default=None)


def similar(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that looks most like `name`; what it means may be another thing."""
    return next(iter(difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.7)), None)


def _words_joined(name: str) -> str:
    words = re.split(r"[_\-\s]+", name.lower())
    return "_".join(word for word in words if word not in _FILLERS) or name


def _digits(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def _slips(typed: str, meant: str) -> int:
    """Letters left out, added, replaced, or exchanged with their neighbor between two names; 3 stands for more."""
    if abs(len(typed) - len(meant)) > 2 or len(set(typed) ^ set(meant)) > 4:
        return 3
    above: list[int] = []
    row = list(range(len(meant) + 1))
    for i, left in enumerate(typed, start=1):
        two_above, above, row = above, row, [i]
        for j, right in enumerate(meant, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
            if i > 1 and j > 1 and left == meant[j - 2] and right == typed[i - 2]:
                row[-1] = min(row[-1], two_above[j - 2] + 1)
    return min(row[-1], 3)
