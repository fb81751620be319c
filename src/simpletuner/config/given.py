"""Validation of keys and values from any source against a slice of options, with a problem for each faulty key."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from simpletuner.base.errors import Problem
from simpletuner.config.options.kinds import Slice, untyped_value
from simpletuner.config.other_keys import NO_OTHER_KEYS, NOT_YET, OtherKey, OtherKeys
from simpletuner.config.paths import stray_text
from simpletuner.config.values import (
    OptionType,
    from_file,
    from_text,
    is_quoted_number,
    kinds,
    nearest,
    no_effect,
    similar,
    value_text,
)

Origin = Literal["default", "file", "environment", "flag"]
ORIGINS: tuple[Origin, ...] = ("default", "file", "environment", "flag")
"""All origins, from the lowest precedence to the highest."""


@dataclass(frozen=True)
class GivenValue:
    """A value that the user gave."""

    value: object
    origin: Origin
    spelled: str
    """The key as it was typed: `lora_rank`, `--lora_rank`, `SIMPLETUNER_LORA_RANK`."""


@dataclass(frozen=True)
class KnownKeys:
    """The keys that a mapping may contain: the fields of `model`, and other keys that are known but not fields of
    it."""

    model: type[Slice]
    other_keys: OtherKeys = NO_OTHER_KEYS
    noun: str = "option"
    foreign_keys: Collection[str] = ()
    """Keys that belong in `other_place` instead."""

    other_place: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Every known key."""
        return (*self.model.model_fields, *self.other_keys.aliases, *self.other_keys.keys)


@dataclass
class CheckedKeys:
    """Result of the check. `problems` has one entry for each faulty key, in the order given."""

    valid: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, Problem] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def by_canonical_name(
    source: Iterable[tuple[str, GivenValue]], known_keys: KnownKeys, checked: CheckedKeys, *, prefix: str = ""
) -> dict[str, GivenValue]:
    """One source's values by canonical key. A key that is given twice is a problem. `prefix` begins each message."""
    givens: dict[str, GivenValue] = {}
    for key, given_value in source:
        name = known_keys.other_keys.aliases.get(key, key)
        if name in givens:
            checked.problems[name] = Problem(
                f"{prefix}{givens[name].spelled} and {given_value.spelled} are both given, and mean the same",
                remedy="Keep one of them.",
            )
            continue
        if name != key:
            checked.notices.append(f"{prefix}{given_value.spelled} is read as {name}.")
        givens[name] = given_value
    return givens


def check_givens(
    givens: Mapping[str, GivenValue], known_keys: KnownKeys, checked: CheckedKeys, *, prefix: str = ""
) -> CheckedKeys:
    """Add to `checked` the valid values in `givens`, and a problem for each faulty or missing key.

    `prefix` begins each message: the file and the entry, if the key alone does not identify them.
    """
    all_kinds = kinds(known_keys.model)
    values: dict[str, Any] = {}
    faulty: dict[str, Problem] = {}
    ignored: dict[str, list[str]] = {}
    for key, given_value in givens.items():
        label = prefix + given_value.spelled
        if key not in all_kinds:
            other_key = known_keys.other_keys.of(key)
            if other_key is None:
                faulty[key] = _unknown_key(label, key, given_value, known_keys)
            elif other_key.is_ignored and not other_key.passes(untyped_value(given_value.value)):
                ignored.setdefault(other_key.meaning, []).append(given_value.spelled)
            elif not other_key.passes(untyped_value(given_value.value)):
                faulty[key] = _rejected_key(label, given_value, other_key)
        elif given_value.value is not None:
            kind = all_kinds[key]
            value = _parsed(given_value, kind)
            stray = stray_text(label, value, is_path=kind.is_path or kind.is_model)
            other_key = known_keys.other_keys.of_value(key, value)
            if stray is not None:
                faulty[key] = stray
            elif other_key is not None:
                remedy = (
                    f"Until then it takes {kind.expects}."
                    if other_key.meaning.startswith(NOT_YET)
                    else other_key.remedy
                )
                faulty[key] = Problem(f"{label} = {value_text(value)}: {other_key.meaning}", remedy=remedy)
            else:
                values[key] = value
    checked.notices += [prefix + no_effect(keys, reason) for reason, keys in ignored.items()]
    for key in refused(known_keys.model, values):
        if key in faulty:
            continue
        if key in givens:
            faulty[key] = _rejected_value(prefix, givens[key], all_kinds[key])
        else:
            faulty[key] = Problem(f"{prefix}{key} is missing", all_kinds[key].expects)
        values.pop(key, None)
    checked.valid.update(values)
    order = [*givens, *(key for key in faulty if key not in givens)]
    checked.problems.update((key, faulty[key]) for key in order if key in faulty)
    return checked


def refused(model: type[Slice], values: dict[str, Any]) -> list[str]:
    """The keys in `values` that `model` rejects, and the required keys that are missing."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        return list(dict.fromkeys(str(fault["loc"][0]) for fault in error.errors(include_url=False)))
    return []


def _rejected_key(label: str, given_value: GivenValue, other_key: OtherKey) -> Problem:
    # Show the value only if another value would be accepted; otherwise it may be a secret.
    value = f" = {value_text(untyped_value(given_value.value))}" if other_key.off else ""
    return Problem(f"{label}{value}: {other_key.meaning}", remedy=other_key.remedy)


def _unknown_key(label: str, key: str, given_value: GivenValue, known_keys: KnownKeys) -> Problem:
    if key in known_keys.foreign_keys and key not in known_keys.other_keys.nicknames:
        return Problem(f"{label}: no such {known_keys.noun}", remedy=f"It belongs in {known_keys.other_place}.")
    near = known_keys.other_keys.nicknames.get(key) or nearest(key, known_keys.names)
    if near is None:
        return Problem(f"{label}: no such {known_keys.noun}")
    spelled = _spelled_like(given_value, known_keys.other_keys.aliases.get(near, near))
    return Problem(f"{label}: no such {known_keys.noun}", remedy=f"Did you mean {spelled}?")


def _spelled_like(given_value: GivenValue, name: str) -> str:
    """`name` in the spelling of `given_value`'s source: environment variable, flag or key."""
    if given_value.origin == "environment":
        return f"SIMPLETUNER_{name.upper()}"
    return f"--{name}" if given_value.spelled.startswith("--") else name


def _parsed(given_value: GivenValue, kind: OptionType) -> object:
    if isinstance(given_value.value, str) and given_value.origin in ("environment", "flag"):
        return from_text(given_value.value, kind)
    return from_file(given_value.value, kind)


def _rejected_value(prefix: str, given_value: GivenValue, kind: OptionType) -> Problem:
    if given_value.value is True and given_value.origin == "flag":
        return Problem(f"{given_value.spelled} has no value", kind.expects)
    value = _parsed(given_value, kind)
    remedy = ""
    if is_quoted_number(value, kind):
        remedy = "Write it without quotes."
    elif isinstance(value, str) and is_quoted_number(value.replace(",", "."), kind):
        remedy = "Write a decimal point, not a comma."
    if isinstance(value, str) and len(kind.near) > 4:  # `expects` already lists a few names
        meant, alike = nearest(value, kind.near), similar(value, kind.near)
        remedy = f"Did you mean {meant}?" if meant else f"The nearest is {alike}." if alike else remedy
    return Problem(f"{prefix}{given_value.spelled} = {value_text(value)}", kind.expects, remedy)
