"""`simpletuner dataset VERB`: the images and captions before a run."""

from importlib import import_module

from simpletuner.base.console import say
from simpletuner.cli.arguments import verb_of, wants_help

DATASET_VERBS = {
    "scan": "scanning",
    "show": "scanning",
    "cache": "scanning",
    "captions": "imagefolder",
    "duplicates": "imagefolder",
    "delete": "imagefolder",
}
"""And the module of `simpletuner.cli` that knows each. Imported when it is asked for: decoding images takes half a
second to import, which changing captions does without."""


def run(arguments: list[str]) -> int:
    """Do what the verb says.

    Raises:
        ConfigError: a mistake in what was typed, or in the configuration.
        DataError: a folder or set is missing, or nothing in it can be trained.
        DiskError: a file cannot be written.
    """
    if wants_help(arguments):
        modules = (
            dict.fromkeys(DATASET_VERBS.values())
            if arguments[0] not in DATASET_VERBS
            else (DATASET_VERBS[arguments[0]],)
        )
        say("\n".join(import_module(f"simpletuner.cli.{module}").usage() for module in modules))
        return 0
    module = DATASET_VERBS[verb_of("dataset", arguments, DATASET_VERBS)]
    exit_code: int = import_module(f"simpletuner.cli.{module}").run(arguments)
    return exit_code
