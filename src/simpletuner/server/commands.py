"""Requests as arguments of the shell's commands, and what those print as an answer."""

import json
from typing import Annotated, Any

from pydantic import Field

from simpletuner.config.run import RunConfig
from simpletuner.config.values import kinds, nearest
from simpletuner.server.body import RequestBody
from simpletuner.server.environments import NAME_OR_NONE, selecting
from simpletuner.server.faults import Fault
from simpletuner.server.roots import Roots
from simpletuner.server.shell import Finished, problems_told

LONGEST_TEXT = 4096

Option = str | int | float | bool
Options = dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=64)], Option]


class ToTrain(RequestBody):
    """What to train: an environment or an example, and options that differ from it."""

    environment: Annotated[str, Field(pattern=NAME_OR_NONE)] | None = None
    example: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    options: Options = Field(default={}, max_length=200)


def train_arguments(roots: Roots, wanted: ToTrain) -> list[str]:
    """What follows `simpletuner train`.

    Raises:
        Fault: 422, not exactly one of environment and example, an option that is none; 404, no such environment. What
            the paths among the options may be is for the command to say, which resolves them: see `reach`.
    """
    if (wanted.environment is None) == (wanted.example is None):
        raise Fault.of(422, "what to train is not said", "an environment or an example")
    known = kinds(RunConfig)
    arguments = [f"--example={wanted.example}"]
    if wanted.environment is not None:
        arguments = selecting(roots, wanted.environment)
    for name, value in wanted.options.items():
        if name not in known:
            near = nearest(name, known)
            raise Fault.of(422, f"{name}: no such option", remedy=f"Did you mean {near}?" if near else "")
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if "\0" in text or len(text) > LONGEST_TEXT:
            raise Fault.of(422, f"{name} cannot be given to a command", f"a text of at most {LONGEST_TEXT} characters")
        arguments.append(f"--{name}={text}")
    return arguments


def output(finished: Finished) -> str:
    """What a command printed.

    Raises:
        Fault: 422, it failed: its problems.
    """
    if finished.exit_code:
        raise Fault(422, *problems_told(finished))
    return finished.out


def printed(finished: Finished) -> dict[str, Any]:
    """The JSON object that a command printed.

    Raises:
        Fault: as `output`.
    """
    told = json.loads(output(finished))
    assert isinstance(told, dict)
    return told
