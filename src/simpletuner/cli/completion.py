"""`simpletuner completion bash|zsh|fish`: prints the script by which a shell completes the command line.

The script holds every word it needs, so that completing starts no Python.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.base.console import say
from simpletuner.cli.arguments import Flag, declared_fields, declared_flags, parse_command, verb_of
from simpletuner.cli.main import COMMANDS, HELP
from simpletuner.cli.sample import SampleConfig
from simpletuner.config.flags import LIKE, SELECTORS
from simpletuner.config.load import EXAMPLES_FOLDER
from simpletuner.config.run import RunConfig
from simpletuner.config.values import OptionType, kinds

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from simpletuner.cli.help import Forms

USAGE = """usage: simpletuner completion bash|zsh|fish

  bash   eval "$(simpletuner completion bash)" is the line for ~/.bashrc
  zsh    eval "$(simpletuner completion zsh)" is the line for ~/.zshrc, after compinit
  fish   simpletuner completion fish | source is the line for ~/.config/fish/config.fish

  It completes commands, verbs, flags and their values, --env names and the folders of runs. Nothing of this program
  runs while you type.
"""


@dataclass(frozen=True)
class CompletionCommand:
    """What is typed after the name of a shell: nothing."""


FORMS = dict.fromkeys(("bash", "zsh", "fish"), CompletionCommand)
"""What is typed after each verb."""


@dataclass(frozen=True)
class FlagValue:
    """What completes the value of a flag."""

    kind: str = "other"
    """words, file, folder, env, run, or other: it takes a value that nobody can guess."""
    words: tuple[str, ...] = ()


@dataclass
class Grammar:
    """What may be typed where. A place is the words that lead there, each behind a slash: "/run/queue"."""

    verbs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    flags: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Those of the place itself."""
    takes_options: set[str] = field(default_factory=set)
    """Places where the options of `train` may be typed too."""
    takes_names: dict[str, str] = field(default_factory=dict)
    """Places where a word without a flag is the name of a run or a folder, and which of these."""
    values: dict[str, FlagValue] = field(default_factory=dict)
    """Of each flag that takes one."""

    def add_forms(self, place: str, forms: "Forms") -> None:
        """The places of a command's verbs, or of a verb's verbs."""
        self.verbs[place] = tuple(filter(None, forms))
        self.flags[place] = ("--help",)
        for verb, form in forms.items():
            inner = f"{place}/{verb}" if verb else place
            if isinstance(form, Mapping):
                self.add_forms(inner, form)
            else:
                self._add_form(inner, form, verb)

    def _add_form(self, place: str, form: type["DataclassInstance"], verb: str) -> None:
        self.verbs.setdefault(place, ())
        declared = declared_flags(form, verb)
        selectors = SELECTORS if any(each.name == "train_options" for each in fields(form)) else {}
        self.flags[place] = (*(f"--{name}" for name in (*declared, *selectors)), "--help")
        self.values |= {f"--{name}": _of_flag(flag) for name, flag in declared.items() if flag.metavar}
        if selectors:
            self.takes_options.add(place)
        names = [name for name, declaration in declared_fields(form, verb).items() if not isinstance(declaration, Flag)]
        if names[:1] in (["run"], ["folder"]):
            self.takes_names[place] = names[0]

    def add_options(self, options: Mapping[str, OptionType]) -> None:
        """The values of options of a configuration."""
        self.values |= {f"--{name}": _of_option(kind) for name, kind in options.items()}


def grammar() -> Grammar:
    """Of every command of the table."""
    found = Grammar()
    found.verbs[""] = (*COMMANDS, HELP[0])
    found.flags[""] = ("--help", "--version")
    found.verbs["/help"] = tuple(COMMANDS)
    found.flags["/help"] = ()
    for command in COMMANDS:
        if command not in ("train", "sample"):
            found.add_forms(f"/{command}", import_module(f"simpletuner.cli.{command}").FORMS)
    found.add_options(kinds(SampleConfig))
    found.add_options(kinds(RunConfig))
    found.verbs |= {"/train": (), "/sample": ()}
    found.flags["/train"] = (*(f"--{name}" for name in SELECTORS), "--help")
    found.flags["/sample"] = (*(f"--{name}" for name in SampleConfig.model_fields), "--config", "--help")
    found.takes_options.add("/train")
    examples = tuple(sorted(path.parent.name for path in EXAMPLES_FOLDER.glob("*/config.json")))
    found.values |= {
        "--config": FlagValue("file"),
        f"--{LIKE}": FlagValue("file"),
        "--env": FlagValue("env"),
        "--example": FlagValue("words", examples),
        "--lora": FlagValue("file"),
        "--run": FlagValue("run"),
    }
    return found


def _of_flag(flag: Flag) -> FlagValue:
    if flag.metavar == "FOLDER":
        return FlagValue("folder")
    return FlagValue("file" if flag.metavar in ("PATH", "FILE", "PEM") else "other")


def _of_option(kind: OptionType) -> FlagValue:
    if kind.base is bool:
        return FlagValue("words", ("true", "false"))
    if kind.near:
        return FlagValue("words", kind.near)
    return FlagValue("file" if kind.is_path or kind.is_model or kind.is_json else "other")


def script(shell: str) -> str:
    """The script for `shell`."""
    found = grammar()
    assign = _assigned_in_fish if shell == "fish" else _assigned
    by_value: dict[FlagValue, list[str]] = {}
    for name, value in found.values.items():
        by_value.setdefault(value, []).append(name)
    places = [
        assign(
            [place],
            {
                "verbs": found.verbs[place],
                "flags": found.flags[place],
                "takes": ["options"] if place in found.takes_options else [],
                "named": [found.takes_names[place]] if place in found.takes_names else [],
            },
        )
        for place in found.verbs
    ]
    values = [assign(names, {"kind": [value.kind], "values": value.words}) for value, names in by_value.items()]
    filled = {
        "@PLACES@": (" " if shell == "fish" else "|").join(filter(None, found.verbs)),
        "@OF_PLACE@": "\n".join(places),
        "@OF_FLAG@": "\n".join(values),
        "@OPTIONS@": " ".join(f"--{name}" for name in RunConfig.model_fields),
    }
    text = Path(__file__).with_name(f"completion.{shell}").read_text(encoding="utf-8")
    for mark, content in filled.items():
        text = text.replace(mark, content)
    return text


def _assigned(patterns: Iterable[str], values: Mapping[str, Iterable[str]]) -> str:
    """A case of bash and zsh that sets variables to words with spaces between."""
    body = " ".join(f"{name}='{' '.join(words)}'" for name, words in values.items())
    return f"        {'|'.join(map(_quoted, patterns))}) {body} ;;"


def _assigned_in_fish(patterns: Iterable[str], values: Mapping[str, Iterable[str]]) -> str:
    """The same, to lists of words."""
    sets = "; ".join(" ".join(("set", name, *words)) for name, words in values.items())
    return f"        case {' '.join(map(_quoted, patterns))}\n            {sets}"


def _quoted(pattern: str) -> str:
    return pattern or "''"


def run(arguments: list[str]) -> int:
    """Print the script.

    Raises:
        ConfigError: no shell is named, or another one.
    """
    shell = verb_of("completion", arguments, FORMS)
    parse_command(CompletionCommand, arguments[1:])
    say(script(shell))
    return 0
