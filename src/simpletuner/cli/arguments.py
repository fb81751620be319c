"""What a command takes, declared as a frozen dataclass, and the parser that reads a command line into it.

    @dataclass(frozen=True)
    class PlanCommand:
        vram: float | None = Flag("plan for a card of this size", "GIB", convert=parse_gib).default(None)
        json: bool = Flag("print one JSON object instead").default(False)
        rest: tuple[str, ...] = ()

A field's name is the flag's, with dashes for underscores; its default is what holds without the flag.
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
"""Key of a field's metadata."""


@dataclass(frozen=True, kw_only=True)
class Positional:
    """A field that is typed without a flag. Words fill these fields in order."""

    convert: Callable[[str], object] = str
    """The field's value from the text."""
    verbs: tuple[str, ...] = ()
    """The command's verbs that take it; empty for all."""

    def default(self, value: Default) -> Default:
        """A dataclass field declared by this, with its default."""
        return field(default=value, metadata={_DECLARATION: self})


@dataclass(frozen=True)
class Flag(Positional):
    """A field that is typed as a flag.

    `convert` raises ValueError where the text is not what `expects` says, or a ConfigError with problems of its own.
    """

    help: str = ""
    """With its line breaks. Empty where the command's usage describes the flag elsewhere."""
    metavar: str = ""
    """The value's name in the help. A flag without one is a switch: it takes no value, and its field is a bool."""
    expects: str = ""
    """What `convert` accepts, in words."""
    follows: str = "a value"
    """What is missing where nothing follows the flag, in words."""
    is_repeatable: bool = False
    """Whether the field is a tuple with the value of each occurrence."""


def parse_command(
    form: type[Form],
    arguments: Sequence[str],
    verb: str = "",
    check: Callable[[Form], Iterable[Problem]] = lambda _: (),
) -> Form:
    """Read `arguments`, which follow `verb`, into a `form`.

    A form with the field `rest` is followed by options of `train`: what it does not declare goes there in order, and
    the last of several occurrences of a flag counts. A form without that field refuses both. `check` finds problems of
    flags that do not go together; a flag with a problem of its own has its default there.

    Raises:
        ConfigError: every problem at once.
    """
    flags = declared_flags(form, verb)
    positionals = [
        (name, declared) for name, declared in declared_fields(form, verb).items() if not isinstance(declared, Flag)
    ]
    is_open = "rest" in {each.name for each in fields(form)}
    values: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    rest: list[str] = []
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
            # A word behind a flag of `form` must not become the value of an option in front of that flag.
            is_ambiguous = argument.name is None and bool(rest) and rest[-1].startswith("--")
            place = len(rest) - is_ambiguous
            rest[place:place] = argument.typed
        else:
            problems.append(_unknown(argument.typed[0], flags))
    if is_open:
        values["rest"] = tuple(rest)
    else:
        problems += [
            Problem(f"--{name} is given {len(given)} times", "once")
            for name, given in texts.items()
            if len(given) > 1 and not flags[name].is_repeatable
        ]
    for name, flag in flags.items():
        given = texts.get(name, [])
        converted = _converted(name, flag, given if flag.is_repeatable else given[-1:], problems)
        if converted:
            values[name.replace("-", "_")] = tuple(converted) if flag.is_repeatable else converted[0]
    request = form(**values)
    ConfigError.raise_if([*problems, *check(request)])
    return request


def one_of(words: Sequence[Word]) -> Callable[[str], Word]:
    """The conversion of a flag that takes one of `words`."""
    return lambda text: words[words.index(text)]


def verb_of(command: str, arguments: Sequence[str], verbs: Collection[str], expects: str = "") -> str:
    """The first of `arguments`.

    Raises:
        ConfigError: it is none of `verbs`, which `expects` describes where that is more than a list of them.
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


def refuse_rest(rest: Sequence[str], command: str) -> None:
    """Raise a ConfigError if a command that takes no options of `train` was given some, or too many words."""
    if rest:
        raise ConfigError.of(f"{command}: {' '.join(rest)} is not understood", remedy=f"See `{command} --help`.")


def flag_rows(forms: Sequence[type["DataclassInstance"]], verb: str = "") -> dict[str, str]:
    """Each flag that `verb` takes of `forms` as it is typed, with its help; without a verb, of all.

    A flag of several forms has the help of the first.
    """
    flags: dict[str, Flag] = {}
    for form in forms:
        flags |= {name: flag for name, flag in declared_flags(form, verb).items() if name not in flags}
    return {f"--{name} {flag.metavar}".rstrip(): flag.help for name, flag in flags.items() if flag.help}


def declared_fields(form: type["DataclassInstance"], verb: str = "") -> dict[str, Positional]:
    """The declarations of the fields that `verb` takes; without a verb, of all."""
    declared = {each.name: each.metadata[_DECLARATION] for each in fields(form) if _DECLARATION in each.metadata}
    return {name: each for name, each in declared.items() if not (verb and each.verbs) or verb in each.verbs}


def declared_flags(form: type["DataclassInstance"], verb: str = "") -> dict[str, Flag]:
    """The flags that `verb` takes, by their names; without a verb, all."""
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


def _unknown(word: str, flags: Iterable[str]) -> Problem:
    near = nearest(word.removeprefix("--").partition("=")[0], flags)
    return Problem(f"{word}: no such flag", remedy=f"Did you mean --{near}?" if near else "See --help.")
