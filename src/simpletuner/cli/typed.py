"""What was typed after a verb: its own words and flags, and the options of `train` among them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.cli.loading import load_here
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.status import find_runs

RUNS = Path("output")
"""Where runs lie unless they are sent elsewhere."""


@dataclass
class Typed:
    """The parts of a command line."""

    words: list[str] = field(default_factory=list)
    """What is no flag and no flag's value."""
    switches: set[str] = field(default_factory=set)
    """Own flags without a value, without their dashes."""
    values: dict[str, list[str]] = field(default_factory=dict)
    """Own flags with a value, as often as they were given."""
    rest: list[str] = field(default_factory=list)
    """For the configuration."""

    def nothing_else(self, what: str, words: int = 0) -> None:
        """Raise a ConfigError unless these are all of its words, and no options of `train` are left."""
        stray = [*self.words[words:], *self.rest]
        if stray:
            raise ConfigError.of(f"{what}: {' '.join(stray)} is not understood", remedy=f"See `{what} --help`.")


def typed(arguments: Sequence[str], *, switches: Collection[str], values: Collection[str] = ()) -> Typed:
    """Sort what was typed. A word after a flag that is not ours is that flag's value.

    Raises:
        ConfigError: a flag without its value.
    """
    found = Typed()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            found.words.append(word)
        elif name in switches and not has_value:
            found.switches.add(name)
        elif name in values:
            if not has_value and (not rest or rest[0].startswith("--")):
                raise ConfigError.of(f"--{name}: nothing follows it", "a value")
            found.values.setdefault(name, []).append(value if has_value else rest.pop(0))
        else:
            found.rest.append(word)
            if not has_value and rest and not rest[0].startswith("--"):
                found.rest.append(rest.pop(0))
    return found


def run_of(found: Typed, what: str) -> RunDirectory:
    """The run that the first word names; without one, that of the configuration found here.

    Raises:
        ConfigError: there is no such run, the configuration is wrong, or more was typed.
    """
    if found.words:
        found.nothing_else(what, words=1)
        run = RunDirectory(Path(found.words[0]))
    else:
        try:
            run = RunDirectory(Path(load_here(found.rest).config.output_dir))
        except ConfigError as error:
            no_run = Problem("no run is named", f"its directory after `{what}`, or a configuration that tells it")
            raise ConfigError(no_run, *error.problems) from None
    if run.events.is_file() or run.lock().is_held():
        return run
    others = {str(other.root): other for other in find_runs(RUNS)}
    near = get_close_matches(str(run.root), others, n=1) or [
        path for path, other in others.items() if other.root.name == run.root.name
    ]
    if near:
        remedy = f"Did you mean {near[0]}?"
    else:
        remedy = "`simpletuner run list` lists the runs." if others else "`simpletuner run start` starts one."
    raise ConfigError.of(f"{run.root}: no run is there", remedy=remedy)
