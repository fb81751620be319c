"""`simpletuner completion bash|zsh|fish`: print a script that lets the shell complete simpletuner's command lines.

The script contains all words, so completion starts no Python process.
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

  bash   add this line to ~/.bashrc: eval "$(simpletuner completion bash)"
  zsh    add this line to ~/.zshrc, after compinit: eval "$(simpletuner completion zsh)"
  fish   add this line to ~/.config/fish/config.fish: simpletuner completion fish | source

  Prints a script that completes commands, verbs, flags and their values, --env names and run directories. Completion
  does not run simpletuner.
"""


@dataclass(frozen=True)
class CompletionCommand:
    """Arguments of `simpletuner completion SHELL`: none."""


FORMS = dict.fromkeys(("bash", "zsh", "fish"), CompletionCommand)
"""The arguments of each verb."""


@dataclass(frozen=True)
class FlagValue:
    """Completion of a flag's value."""

    kind: str = "other"
    """words, file, folder, env, run, or other; other means a value that cannot be completed."""
    words: tuple[str, ...] = ()


@dataclass
class Grammar:
    """The verbs and flags that each subcommand takes. A subcommand is written like a path: "/run/queue" for `run
    queue`, and "" for the program itself."""

    verbs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    flags: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The flags that each subcommand declares."""
    takes_options: set[str] = field(default_factory=set)
    """Subcommands that also take the options of `train`."""
    positional_kinds: dict[str, str] = field(default_factory=dict)
    """Subcommands whose first positional argument is a run or a folder: "run" or "folder"."""
    values: dict[str, FlagValue] = field(default_factory=dict)
    """Completion of each flag that takes a value."""

    def add_forms(self, subcommand: str, forms: "Forms") -> None:
        """Add `subcommand` with its verbs, and their verbs."""
        self.verbs[subcommand] = tuple(filter(None, forms))
        self.flags[subcommand] = ("--help",)
        for verb, form in forms.items():
            inner = f"{subcommand}/{verb}" if verb else subcommand
            if isinstance(form, Mapping):
                self.add_forms(inner, form)
            else:
                self._add_form(inner, form, verb)

    def _add_form(self, subcommand: str, form: type["DataclassInstance"], verb: str) -> None:
        self.verbs.setdefault(subcommand, ())
        declared = declared_flags(form, verb)
        selectors = SELECTORS if any(each.name == "train_options" for each in fields(form)) else {}
        self.flags[subcommand] = (*(f"--{name}" for name in (*declared, *selectors)), "--help")
        self.values |= {f"--{name}": _of_flag(flag) for name, flag in declared.items() if flag.metavar}
        if selectors:
            self.takes_options.add(subcommand)
        names = [name for name, declaration in declared_fields(form, verb).items() if not isinstance(declaration, Flag)]
        if names[:1] in (["run"], ["folder"]):
            self.positional_kinds[subcommand] = names[0]

    def add_options(self, options: Mapping[str, OptionType]) -> None:
        """Add the completion of the values of a configuration's options."""
        self.values |= {f"--{name}": _of_option(kind) for name, kind in options.items()}


def grammar() -> Grammar:
    """The grammar of all commands."""
    commands = Grammar()
    commands.verbs[""] = (*COMMANDS, HELP[0])
    commands.flags[""] = ("--help", "--version")
    commands.verbs["/help"] = tuple(COMMANDS)
    commands.flags["/help"] = ()
    for command in COMMANDS:
        if command not in ("train", "sample"):
            commands.add_forms(f"/{command}", import_module(f"simpletuner.cli.{command}").FORMS)
    commands.add_options(kinds(SampleConfig))
    commands.add_options(kinds(RunConfig))
    commands.verbs |= {"/train": (), "/sample": ()}
    commands.flags["/train"] = (*(f"--{name}" for name in SELECTORS), "--help")
    commands.flags["/sample"] = (*(f"--{name}" for name in SampleConfig.model_fields), "--config", "--help")
    commands.takes_options.add("/train")
    examples = tuple(sorted(path.parent.name for path in EXAMPLES_FOLDER.glob("*/config.json")))
    commands.values |= {
        "--config": FlagValue("file"),
        f"--{LIKE}": FlagValue("file"),
        "--env": FlagValue("env"),
        "--example": FlagValue("words", examples),
        "--lora": FlagValue("file"),
        "--run": FlagValue("run"),
    }
    return commands


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
    """The completion script for `shell`."""
    commands = grammar()
    case_clause = _fish_case_clause if shell == "fish" else _case_clause
    by_value: dict[FlagValue, list[str]] = {}
    for name, value in commands.values.items():
        by_value.setdefault(value, []).append(name)
    subcommands = [
        case_clause(
            [subcommand],
            {
                "verbs": commands.verbs[subcommand],
                "flags": commands.flags[subcommand],
                "takes": ["options"] if subcommand in commands.takes_options else [],
                "positional": [commands.positional_kinds[subcommand]]
                if subcommand in commands.positional_kinds
                else [],
            },
        )
        for subcommand in commands.verbs
    ]
    values = [case_clause(names, {"kind": [value.kind], "values": value.words}) for value, names in by_value.items()]
    replacements = {
        "@SUBCOMMANDS@": (" " if shell == "fish" else "|").join(filter(None, commands.verbs)),
        "@OF_SUBCOMMAND@": "\n".join(subcommands),
        "@OF_FLAG@": "\n".join(values),
        "@OPTIONS@": " ".join(f"--{name}" for name in RunConfig.model_fields),
    }
    text = Path(__file__).with_name(f"completion.{shell}").read_text(encoding="utf-8")
    for mark, content in replacements.items():
        text = text.replace(mark, content)
    return text


def _case_clause(patterns: Iterable[str], values: Mapping[str, Iterable[str]]) -> str:
    """A clause of `case` in bash and zsh that sets each variable to its words, separated by spaces."""
    body = " ".join(f"{name}='{' '.join(words)}'" for name, words in values.items())
    return f"        {'|'.join(map(_quoted, patterns))}) {body} ;;"


def _fish_case_clause(patterns: Iterable[str], values: Mapping[str, Iterable[str]]) -> str:
    """A `case` clause of fish that sets each variable to its list of words."""
    sets = "; ".join(" ".join(("set", name, *words)) for name, words in values.items())
    return f"        case {' '.join(map(_quoted, patterns))}\n            {sets}"


def _quoted(pattern: str) -> str:
    return pattern or "''"


def run(arguments: list[str]) -> int:
    """Print the script.

    Raises:
        ConfigError: no shell is named, or an unknown one.
    """
    shell = verb_of("completion", arguments, FORMS)
    parse_command(CompletionCommand, arguments[1:])
    say(script(shell))
    return 0
