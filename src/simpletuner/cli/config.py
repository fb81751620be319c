"""`simpletuner config check|show`: the configuration, held against the schema, without training."""

from simpletuner.base.errors import ConfigError
from simpletuner.cli.loading import load_here
from simpletuner.config.flags import help_text, wants_help
from simpletuner.config.load import Loaded
from simpletuner.config.values import shown

USAGE = "simpletuner config check|show [--config PATH | --env NAME | --example NAME] [--option value ...]"


def run(arguments: list[str]) -> int:
    """Check the configuration, or show every option with its value and where that comes from.

    Raises:
        ConfigError: every problem of the configuration.
    """
    if wants_help(arguments):
        print(help_text(USAGE))
        return 0
    if not arguments or arguments[0] not in ("check", "show"):
        raise ConfigError.of("simpletuner config: nothing to do", "check or show after it")
    loaded = load_here(arguments[1:])
    print(_table(loaded) if arguments[0] == "show" else _summary(loaded))
    return 0


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
