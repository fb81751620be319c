"""`simpletuner config check|show`: validate or print the configuration, without training."""

from dataclasses import dataclass
from typing import Any

from simpletuner.base.console import say
from simpletuner.base.errors import ConfigError
from simpletuner.cli.arguments import Flag, parse_command, verb_of
from simpletuner.cli.loading import examine_here, load_here
from simpletuner.cli.printing import json_text
from simpletuner.config.load import ExaminedConfig, LoadedConfig
from simpletuner.config.values import value_text

USAGE = """usage: simpletuner config check|show [--json] [options of `simpletuner train`]

  check   list all problems of the configuration, or confirm that it is valid
  show    print every option with its value and the origin of the value
"""


@dataclass(frozen=True)
class ConfigCommand:
    """Arguments of `simpletuner config check` and `show`."""

    json: bool = Flag("print one JSON object instead, including any problems, each with its option").default(False)
    train_options: tuple[str, ...] = ()


FORMS = dict.fromkeys(("check", "show"), ConfigCommand)
"""The arguments of each verb."""


def run(arguments: list[str]) -> int:
    """Check the configuration, or print every option with its value and the origin of the value.

    Raises:
        ConfigError: all problems of the configuration. With --json they are printed, and the exit code is the same.
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


def _as_json(examined: ExaminedConfig) -> dict[str, Any]:
    values = examined.config.model_dump(mode="json")
    return {
        "problems": [problem.parts for problem in examined.problems],
        "notices": list(examined.notices),
        "values": {name: values[name] for name in examined.origins},
        "origins": examined.origins,
    }


def _table(loaded: LoadedConfig) -> str:
    values = loaded.config.model_dump(mode="json")
    width = max(map(len, values))
    return "\n".join(
        f"{name:<{width}}  {origin:<11}  {value_text(values[name])}" for name, origin in loaded.origins.items()
    )


def _summary(loaded: LoadedConfig) -> str:
    datasets = loaded.datasets
    changed = sum(origin != "default" for origin in loaded.origins.values())
    return "\n".join(
        (
            *loaded.notices,
            f"The configuration is valid: {changed} options set, {len(datasets.train_sets)} training datasets, "
            f"{len(datasets.eval_sets)} held-out datasets, {len(loaded.prompts)} prompts.",
        )
    )
