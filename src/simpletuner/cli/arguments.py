"""Parser of command lines: a frozen dataclass declares a command's arguments, `parse_command` fills it.

    @dataclass(frozen=True)
    class PlanCommand:
        vram: float | None = Flag("plan for a card of this size", "GIB", convert=parse_gib).default(None)
        json: bool = Flag("print one JSON object instead").default(False)
        train_options: tuple[str, ...] = ()

The flag has the field's name, with dashes for underscores. Without the flag, the field has its default.
docs/decisions/0016-one-parser.md compares this with argparse.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from simpletuner.base.commandline import split_arguments
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.config.paths import stray_text
from simpletuner.config.values import join_names, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Form = TypeVar("Form", bound="DataclassInstance")
Default = TypeVar("Default")
Word = TypeVar("Word", bound=str)
_DECLARATION = "declaration"
"""Key of a field's metadata that holds its `Positional` or `Flag`."""


@dataclass(frozen=True, kw_only=True)
class Positional:
    """Declaration of a positional argument. Words that are not flags fill the positional fields in order."""

    convert: Callable[[str], object] = str
    """Function that converts the text into the field's value."""
    verbs: tuple[str, ...] = ()
    """The verbs of the command that take the argument; empty for all verbs."""

    def default(self, value: Default) -> Default:
        """The dataclass field of this declaration, with its default."""
        return field(default=value, metadata={_DECLARATION: self})


@dataclass(frozen=True)
class Flag(Positional):
    """Declaration of a flag.

    `convert` raises ValueError if the text is not what `expects` describes, or a ConfigError with its own problems.
    """

    help: str = ""
    """Help text with its line breaks. Empty if the command's usage describes the flag instead."""
    metavar: str = ""
    """Name of the value in the help. A flag without one is a switch: it takes no value, and its field is a bool."""
    expects: str = ""
    """What `convert` accepts, for messages."""
    follows: str = "a value"
    """What must follow the flag, for the message if nothing does."""
    is_repeatable: bool = False
    """Whether the flag may be repeated. Its field is then a tuple with the value of each occurrence."""


def parse_command(
    form: type[Form],
    arguments: Sequence[str],
    verb: str = "",
    check: Callable[[Form], Iterable[Problem]] = lambda _: (),
) -> Form:
    """Parse `arguments`, which follow `verb`, into a `form`.

    A form with the field `train_options` also takes options of `train`: that field receives, in order, each argument
    that the form does not declare, and the last occurrence of a repeated flag wins. A form without the
    field rejects undeclared arguments and repeated flags. `check` returns the problems of flags that exclude or need
    each other; it sees the default of a flag that has a problem of its own.

    Raises:
        ConfigError: all problems together.
    """
    flags = declared_flags(form, verb)
    positionals = [
        (name, declared) for name, declared in declared_fields(form, verb).items() if not isinstance(declared, Flag)
    ]
    is_open = "train_options" in {each.name for each in fields(form)}
    values: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    train_options: list[str] = []
    problems: list[Problem] = []
    for argument in split_arguments(arguments, lambda name: bool(flags[name].metavar) if name in flags else is_open):
        name = argument.name or ""
        if argument.name is None and positionals:
            first, positional = positionals.pop(0)
            values[first] = positional.convert(argument.typed[0])
        elif name in flags and flags[name].metavar:
            if argument.value is None:
                problems.append(Problem(f"--{name}: nothing follows it", flags[name].follows))
            else:
                texts.setdefault(name, []).append(argument.value)
        elif name in flags and argument.value is None:
            values[name.replace("-", "_")] = True
        elif is_open:
            # A word after a flag of `form` must not become the value of the `train` option before that flag.
            is_ambiguous = argument.name is None and bool(train_options) and train_options[-1].startswith("--")
            index = len(train_options) - is_ambiguous
            train_options[index:index] = argument.typed
        else:
            problems.append(_unknown_flag(argument.typed[0], flags))
    if is_open:
        values["train_options"] = tuple(train_options)
    else:
        problems += [
            Problem(f"--{name} is given {len(occurrences)} times", "once")
            for name, occurrences in texts.items()
            if len(occurrences) > 1 and not flags[name].is_repeatable
        ]
    for name, flag in flags.items():
        occurrences = texts.get(name, [])
        converted = _converted(name, flag, occurrences if flag.is_repeatable else occurrences[-1:], problems)
        if converted:
            values[name.replace("-", "_")] = tuple(converted) if flag.is_repeatable else converted[0]
    command = form(**values)
    ConfigError.raise_if([*problems, *check(command)])
    return command


def whole_number(text: str) -> int:
    """A `convert` function that accepts a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def one_of(words: Sequence[Word]) -> Callable[[str], Word]:
    """A `convert` function that accepts only one of `words`."""
    return lambda text: words[words.index(text)]


def verb_of(command: str, arguments: Sequence[str], verbs: Collection[str], expects: str = "") -> str:
    """The verb of `command`: the first of `arguments`.

    Raises:
        ConfigError: it is not one of `verbs`. The message describes them by `expects`, or lists them if that is empty.
    """
    verb = arguments[0] if arguments else ""
    if verb in verbs:
        return verb
    expects = expects or join_names(verbs, "or")
    if not verb or verb.startswith("-"):
        raise ConfigError.of(f"simpletuner {command}: nothing to do", expects, f"See `simpletuner {command} --help`.")
    near = nearest(verb, verbs)
    remedy = f"Did you mean simpletuner {command} {near}?" if near else ""
    raise ConfigError.of(f"simpletuner {command} {verb}: no such command", expects, remedy)


def refuse_extra(arguments: Sequence[str], command: str) -> None:
    """Raise a ConfigError if `arguments` remain for a `command` that takes no further ones."""
    if arguments:
        raise ConfigError.of(f"{command}: {' '.join(arguments)} is not understood", remedy=f"See `{command} --help`.")


def flag_rows(forms: Sequence[type["DataclassInstance"]], verb: str = "") -> dict[str, str]:
    """Help rows of the flags in `forms` that `verb` takes: the flag as typed, and its help. Without a verb, all flags.

    A flag in several forms has the help of the first.
    """
    flags: dict[str, Flag] = {}
    for form in forms:
        flags |= {name: flag for name, flag in declared_flags(form, verb).items() if name not in flags}
    return {f"--{name} {flag.metavar}".rstrip(): flag.help for name, flag in flags.items() if flag.help}


def declared_fields(form: type["DataclassInstance"], verb: str = "") -> dict[str, Positional]:
    """The declarations in `form` that apply to `verb`, by field; without a verb, all."""
    declared = {each.name: each.metadata[_DECLARATION] for each in fields(form) if _DECLARATION in each.metadata}
    return {name: each for name, each in declared.items() if not (verb and each.verbs) or verb in each.verbs}


def declared_flags(form: type["DataclassInstance"], verb: str = "") -> dict[str, Flag]:
    """The flags in `form` that `verb` takes, by flag name; without a verb, all."""
    declared = declared_fields(form, verb)
    return {name.replace("_", "-"): each for name, each in declared.items() if isinstance(each, Flag)}


def _converted(name: str, flag: Flag, texts: Sequence[str], problems: list[Problem]) -> list[object]:
    converted = []
    for text in texts:
        stray = stray_text(f"--{name}", text, is_path=False)
        if stray is not None:
            problems.append(stray)
            continue
        try:
            converted.append(flag.convert(text))
        except ValueError:
            problems.append(Problem(f"--{name} = {text!r}", flag.expects))
        except ConfigError as error:
            problems += error.problems
    return converted


def _unknown_flag(word: str, flags: Iterable[str]) -> Problem:
    near = nearest(word.removeprefix("--").partition("=")[0], flags)
    return Problem(f"{word}: no such flag", remedy=f"Did you mean --{near}?" if near else "See --help.")
