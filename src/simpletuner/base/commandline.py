"""A command line split into its flags and other words: the one place that knows how a flag takes its value."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CommandArgument:
    """A flag with its value, or a word that belongs to no flag."""

    typed: tuple[str, ...]
    """As it was typed: `--name=value`, `--name` and `value`, `--name` alone, or the word."""
    name: str | None
    """The flag's name without its dashes; None for a word."""
    value: str | None
    """None for a flag without a value, and for a word."""


def split_arguments(
    arguments: Sequence[str], takes_value: Callable[[str], bool] = lambda _: True
) -> Iterator[CommandArgument]:
    """Yield the flags and words of `arguments`, in order.

    The word after a flag is its value, unless that word begins with `--`, or `takes_value` is false for the flag's
    name. `--name=value` always has a value, which may be empty.
    """
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            yield CommandArgument((word,), None, None)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if equals:
            yield CommandArgument((word,), name, value)
        elif rest and not rest[0].startswith("--") and takes_value(name):
            following = rest.pop(0)
            yield CommandArgument((word, following), name, following)
        else:
            yield CommandArgument((word,), name, None)
