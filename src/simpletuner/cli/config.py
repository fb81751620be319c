"""`simpletuner config check|show`: the configuration, held against the schema, without training."""

from dataclasses import dataclass
from typing import Any

from simpletuner.base.console import say
from simpletuner.base.errors import ConfigError
from simpletuner.cli.arguments import Flag, parse_command, verb_of
from simpletuner.cli.loading import examine_here, load_here
from simpletuner.cli.printing import json_text
from simpletuner.config.load import Examined, Loaded
from simpletuner.config.values import shown

USAGE = """usage: simpletuner config check|show [--json] [options of `simpletuner train`]

  check   say everything that is wrong with it, or that it is right
  show    every option with its value and where that comes from
"""


@dataclass(frozen=True)
class ConfigCommand:
    """What is typed after `simpletuner config check` and `show`."""

    json: bool = Flag(
        "print one JSON object instead, also where there are problems: each with the option it is about"
    ).default(False)
    train_options: tuple[str, ...] = ()


FORMS = dict.fromkeys(("check", "show"), ConfigCommand)
"""What is typed after each verb."""


def run(arguments: list[str]) -> int:
    """Check the configuration, or show every option with its value and where that comes from.

    Raises:
        ConfigError: every problem of the configuration; with --json they are printed, and the code is the same.
    """
    verb = verb_of("config", arguments, FORMS)
    command = parse_command(ConfigCommand, arguments[1:])
    if command.json:
        examined = examine_here(command.train_options)
        say(json_text(_as_json(examined)))
        return ConfigError.exit_code if examined.problems else 0
    loaded = load_here(command.train_options)
    say(_table(loaded) if verb == "show" else _summary(loaded))
    return 0


def _as_json(examined: Examined) -> dict[str, Any]:
    values = examined.config.model_dump(mode="json")
    return {
        "problems": [problem.parts for problem in examined.problems],
        "notices": list(examined.notices),
        "values": {name: values[name] for name in examined.origins},
        "origins": examined.origins,
    }


def _table(loaded: Loaded) -> str:
    values = loaded.config.model_dump(mode="json")
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {origin:<11}  {shown(values[name])}" for name, origin in loaded.origins.items())


def _summary(loaded: Loaded) -> str:
    datasets = loaded.datasets
    typed = sum(origin != "default" for origin in loaded.origins.values())
    return "\n".join(
        (
            *loaded.notices,
            f"The configuration is right: {typed} options given, {len(datasets.train_sets)} datasets to "
            f"train, {len(datasets.eval_sets)} held out, {len(loaded.prompts)} prompts.",
        )
    )
