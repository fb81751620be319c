"""Turn requests into arguments of the CLI's commands, and their output into responses."""

import json
from typing import Annotated, Any

from pydantic import Field

from simpletuner.config.run import RunConfig
from simpletuner.config.values import kinds, nearest
from simpletuner.server.body import RequestBody
from simpletuner.server.environments import NAME_OR_NONE, selecting_flags
from simpletuner.server.faults import Fault
from simpletuner.server.roots import Roots
from simpletuner.server.shell import Finished, printed_problems

LONGEST_TEXT = 4096

Option = str | int | float | bool
Options = dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=64)], Option]


class TrainRequest(RequestBody):
    """An environment or an example to train, and options that override it."""

    environment: Annotated[str, Field(pattern=NAME_OR_NONE)] | None = None
    example: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    options: Options = Field(default={}, max_length=200)


def train_arguments(roots: Roots, request: TrainRequest) -> list[str]:
    """Return the arguments for `simpletuner train`.

    Raises:
        Fault: 422, not exactly one of environment and example, or an unknown option; 404, no such environment. Not for
            paths among the options: the command resolves and checks those, see `reach`.
    """
    if (request.environment is None) == (request.example is None):
        raise Fault.of(422, "the request does not say what to train", "an environment or an example")
    option_kinds = kinds(RunConfig)
    arguments = [f"--example={request.example}"]
    if request.environment is not None:
        arguments = selecting_flags(roots, request.environment)
    for name, value in request.options.items():
        if name not in option_kinds:
            suggestion = nearest(name, option_kinds)
            raise Fault.of(422, f"{name}: no such option", remedy=f"Did you mean {suggestion}?" if suggestion else "")
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if "\0" in text or len(text) > LONGEST_TEXT:
            raise Fault.of(
                422,
                f"the value of {name} cannot be passed to a command",
                f"a text of at most {LONGEST_TEXT} characters",
            )
        arguments.append(f"--{name}={text}")
    return arguments


def output(finished: Finished) -> str:
    """Return a command's standard output.

    Raises:
        Fault: 422, the command failed. The fault holds its problems.
    """
    if finished.exit_code:
        raise Fault(422, *printed_problems(finished))
    return finished.out


def printed_json(finished: Finished) -> dict[str, Any]:
    """Return the JSON object that a command printed.

    Raises:
        Fault: as `output`.
    """
    answer = json.loads(output(finished))
    assert isinstance(answer, dict)
    return answer
