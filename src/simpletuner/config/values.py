"""Types of option values: parse values from text, show them in messages, describe what a type accepts, and suggest
names."""

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

from simpletuner.config.options.kinds import Expects, IsJson, IsModel, IsPath, Slice

_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MAX_SHOWN_LENGTH = 80


@dataclass(frozen=True)
class OptionType:
    """Type and range of an option's value."""

    base: Any
    """bool, int, float or str; another type for a structure."""

    choices: tuple[str, ...]
    """The values of an enumeration; empty for other types."""

    expects: str
    """Accepted values in words: "a number above 0", "all, attention, mlp or tiny"."""

    is_path: bool
    is_model: bool
    is_json: bool
    near: tuple[str, ...] = ()
    """Candidates for "Did you mean …?" after a rejected value."""

    minimum: float | None = None
    """The lower bound of a number; `expects` says whether it is inclusive."""

    maximum: float | None = None


def join_names(names: Iterable[str], word: str = "or") -> str:
    """Join names into "a, b or c"; `word` replaces "or"."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def no_effect(keys: Sequence[str], reason: str) -> str:
    """The notice that `keys` have no effect for `reason`."""
    return f"{join_names(keys, 'and')} {'has' if len(keys) == 1 else 'have'} no effect: {reason}."


def _unwrapped(annotation: Any, marks: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """The type inside `Annotated` and `| None`, and `marks` with the annotations of each level added."""
    if get_origin(annotation) is Annotated:
        inner, *inner_marks = get_args(annotation)
        return _unwrapped(inner, (*marks, *inner_marks))
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return _unwrapped(members[0], marks)
    return annotation, tuple(marks)


def _in_words(base: Any, marks: Sequence[Any]) -> str:
    for mark in marks:
        if isinstance(mark, Expects):
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
        near=next((mark.near for mark in marks if isinstance(mark, Expects) and mark.near), choices),
        minimum=_bound([mark.ge if isinstance(mark, Ge) else mark.gt for mark in marks if isinstance(mark, Ge | Gt)]),
        maximum=_bound([mark.le if isinstance(mark, Le) else mark.lt for mark in marks if isinstance(mark, Le | Lt)]),
    )


@cache
def kinds(model: type[Slice]) -> dict[str, OptionType]:
    """The type of every field of `model`, in declaration order."""
    return {name: _kind(field) for name, field in model.model_fields.items()}


def from_text(text: str, kind: OptionType) -> object:
    """Parse `text` from a flag or the environment. Text that is not such a value is returned unchanged, for validation
    to reject."""
    if kind.base is int and _INTEGER.fullmatch(text):
        return int(text)
    if kind.base is float and _NUMBER.fullmatch(text):
        return float(text)
    return from_file(text, kind)


def from_file(value: object, kind: OptionType) -> object:
    """Convert `value` from a file: "true" and "false" to booleans, and inline JSON to its value, if the option expects
    that. Other values are returned unchanged."""
    if kind.base is bool and value in ("true", "false"):
        return value == "true"
    if kind.is_json and isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def is_quoted_number(value: object, kind: OptionType) -> bool:
    """Whether `value` is a quoted number, which would be accepted without the quotes."""
    return isinstance(value, str) and kind.base in (int, float) and from_text(value, kind) is not value


def value_text(value: object) -> str:
    """`value` as a user would type it, truncated to 80 characters: 'al', -1, true, {"a": 1}."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SHOWN_LENGTH else text[: _MAX_SHOWN_LENGTH - 1] + "…"


_FILLERS = frozenset({"a", "as", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"})
"""Words that `nearest` ignores in names."""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name in `names` that `name` is probably a misspelling of; None if there is none.

    At most two typos are allowed in names above 10 letters, one in shorter ones and none below 3 letters, so
    `precision` is not `revision`. Digits must be equal: `adamw4bit` is not `adamw8bit`.
    """
    typed = _words_joined(name)
    typos = {candidate: _typos(typed, _words_joined(candidate)) for candidate in names}
    max_typos = 0 if len(typed) < 3 else 1 if len(typed) <= 10 else 2
    close = [candidate for candidate, count in typos.items() if count <= max_typos]
    same_digits = [candidate for candidate in close if _digits(candidate) == _digits(name)]
    return min(same_digits, key=lambda candidate: typos[candidate], default=None)


def similar(name: str, names: Iterable[str]) -> str | None:
    """The name in `names` that looks most like `name`, although it may mean something else; None if none is close."""
    return next(iter(difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.7)), None)


def _words_joined(name: str) -> str:
    words = re.split(r"[_\-\s]+", name.lower())
    return "_".join(word for word in words if word not in _FILLERS) or name


def _digits(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def _typos(typed: str, meant: str) -> int:
    """Damerau-Levenshtein distance of two names (omitted, added, replaced or swapped letters), at most 3."""
    if abs(len(typed) - len(meant)) > 2 or len(set(typed) ^ set(meant)) > 4:
        return 3
    above: list[int] = []
    row = list(range(len(meant) + 1))
    for i, typed_letter in enumerate(typed, start=1):
        two_above, above, row = above, row, [i]
        for j, meant_letter in enumerate(meant, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (typed_letter != meant_letter)))
            if i > 1 and j > 1 and typed_letter == meant[j - 2] and meant_letter == typed[i - 2]:
                row[-1] = min(row[-1], two_above[j - 2] + 1)
    return min(row[-1], 3)
