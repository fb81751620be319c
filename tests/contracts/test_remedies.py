"""What an error tells people to type can be typed: commands, flags, values and packages in every string of the program
are held against the parsers. Remedies of whole runs are typed in tests/recipes/test_remedies.py."""

import ast
import contextlib
import io
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from simpletuner.base.commandline import command_text, flag, with_flags
from simpletuner.cli.main import COMMANDS, main
from simpletuner.config.datasets import ConditioningSet, ImageSet, TextStore
from simpletuner.config.flags import SELECTORS
from simpletuner.config.given import CheckedKeys, GivenValue, check_givens
from simpletuner.config.load import RUN
from simpletuner.config.options.checkpoint import CheckpointOptions
from simpletuner.config.options.data import DataOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.process import ProcessOptions
from simpletuner.config.options.ranks import RankOptions
from simpletuner.config.options.tracking import TrackingOptions
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.config.other_keys import OPTION_ALIASES
from simpletuner.config.record import CHANGE_THE_CURVE, LEFT_TO_THE_RUN, MAY_CHANGE, SPLIT, recorded_options
from simpletuner.config.run import RunConfig
from simpletuner.config.values import kinds
from simpletuner.data.pixels import PLUGINS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "simpletuner"
UNKNOWN = "\N{OBJECT REPLACEMENT CHARACTER}"
"""What a string puts together at run time."""
VERBS = {
    "dataset": ("scan", "show", "cache", "captions", "duplicates", "delete"),
    "config": ("check", "show"),
    "run": ("start", "stop", "save", "validate", "show", "list", "note", "delete", "queue"),
    "checkpoint": ("list", "verify", "delete"),
}
"""Of commands that have some."""
OF_THE_PROGRAM = {"version"}
"""Flags that stand without a command."""

OF_TORCHRUN = {"standalone", "nproc-per-node"}

COMMAND = re.compile(r"\bsimpletuner ([a-z]+)((?: [a-z]+)*)((?: --[a-z][\w-]*(?:[= ][^\s`.,;]+)?| [A-Z]+)*)")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)(?:=((?:[^\s`;,)]|,(?=\S))*))?")
ASSIGNED = re.compile(r"\b([a-z]+(?:_[a-z0-9]+)+) ?= ?('[^']*'|[\w.+-]+)")
PIP = re.compile(r"pip install (?:-U )?('[^']*'|-e '[^']*'|\S+)")


@dataclass(frozen=True)
class Text:
    """A string of the program, and where it stands."""

    place: str
    text: str


@cache
def texts() -> tuple[Text, ...]:
    """Every string that is not documentation of the code, read when a test first asks for them."""
    return tuple(parsed_texts())


def parsed_texts() -> Iterator[Text]:
    """Strings of the program. What a command is put together of counts as one."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                inner.add(id(node.value))
            if isinstance(node, ast.JoinedStr | ast.Call):
                text = rendered(node)
                if text is not None:
                    inner |= {id(below) for below in ast.walk(node)} - {id(node)}
                    yield Text(f"{path.relative_to(SOURCE)}:{node.lineno}", text)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                yield Text(f"{path.relative_to(SOURCE)}:{node.lineno}", node.value)


def rendered(node: ast.expr) -> str | None:
    """The text of an expression as far as it can be read; None for one that is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(rendered(value) or UNKNOWN for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return rendered(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "command_text":
        return " ".join(UNKNOWN if isinstance(word, ast.Starred) else rendered(word) or UNKNOWN for word in node.args)
    return None


@cache
def help_of(*words: str) -> str:
    """What `simpletuner WORDS --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*words, "--help"]) == 0
    return out.getvalue()


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags that `simpletuner COMMAND` knows, options of `train` included where it takes those."""
    own = help_of(command)
    found = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", own)) | {"help"}
    return frozenset(found | set(options()) if "options of `" in own or command == "train" else found)


def options() -> frozenset[str]:
    return frozenset({*RunConfig.model_fields, *OPTION_ALIASES, *SELECTORS})


def faults_of_value(name: str, value: str) -> list[str]:
    """What is wrong with an option's value as a flag."""
    known = kinds(RunConfig)
    name = OPTION_ALIASES.get(name, name)
    if name not in known:
        return []
    checked = check_givens({name: GivenValue(value, "flag", name)}, RUN, CheckedKeys())
    return [str(problem) for problem in checked.problems.values()]


def test_every_command_that_is_named_is_one() -> None:
    wrong = []
    seen = 0
    for each in texts():
        for match in COMMAND.finditer(each.text):
            word, more = match[1], match[2].split()
            if word in COMMANDS:
                seen += 1
                known = flags_of(word)
                if more and word in VERBS and more[0] not in VERBS[word]:
                    wrong.append(f"{each.place}: {match[0]}: no such verb")
                named = {name for name, _ in FLAG.findall(match[3])}
                wrong += [f"{each.place}: {match[0]}: no --{name}" for name in named - known]
            elif f"`{match[0]}" in each.text:
                wrong.append(f"{each.place}: {match[0]}: no such command")
    assert not wrong, "\n".join(wrong)
    assert seen > 40, "the search finds commands"


def test_every_flag_that_is_named_is_one_and_takes_the_value_that_is_shown() -> None:
    everything = options().union(*(flags_of(command) for command in COMMANDS))
    wrong = []
    for each in texts():
        for name, value in FLAG.findall(each.text):
            if name not in everything | OF_THE_PROGRAM | OF_TORCHRUN:
                wrong.append(f"{each.place}: --{name} is no flag")
            if value and UNKNOWN not in value and name in options() and each.text[:6] != "usage:":
                wrong += [f"{each.place}: {fault}" for fault in faults_of_value(name, value.rstrip("."))]
    assert not wrong, "\n".join(wrong)


def test_every_option_that_is_named_with_a_value_takes_it() -> None:
    wrong = []
    names = {*RunConfig.model_fields, *ImageSet.model_fields, *ConditioningSet.model_fields, *TextStore.model_fields}
    seen = 0
    for each in texts():
        for name, value in ASSIGNED.findall(each.text):
            if name in RunConfig.model_fields:
                seen += 1
                faults = faults_of_value(name, value.strip("'").rstrip("."))
                wrong += [f"{each.place}: {fault}" for fault in faults]
            elif name not in names and any(near in names for near in (name.rstrip("s"), name + "s")):
                wrong.append(f"{each.place}: {name} is no option")
    assert not wrong, "\n".join(wrong)
    assert seen > 5, "the search finds options"


def test_every_package_that_is_named_is_one() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    seen = set()
    for each in texts():
        for what in PIP.findall(each.text):
            extra = re.fullmatch(r"-e '\.\[([\w,-]+)\]'", what)
            if extra:
                seen.add(extra[1])
                assert extra[1] in extras, each
    assert {"optimizers", "quantization"} <= seen
    assert all(re.fullmatch(r"[a-z0-9-]+", package) for _, package in PLUGINS.values())


@pytest.mark.parametrize("name", [name for name, value in recorded_options(RunConfig()).items() if value is not None])
def test_a_recorded_value_can_be_given_back_as_a_flag(name: str) -> None:
    value = recorded_options(RunConfig())[name]
    text = flag(name, value).partition("=")[2]
    checked = check_givens({name: GivenValue(text, "flag", name)}, RUN, CheckedKeys())
    assert RunConfig(**checked.valid) == RunConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flow_custom_timesteps", [100.0, 338.5]),
        ("peft_lora_target_modules", ["to_q", "to_k"]),
        ("optimizer_config", {"amsgrad": True}),
        ("tread_config", {"routes": [{"selection_ratio": 0.5}]}),
        ("learning_rate", 5e-05),
        ("validation_negative_prompt", 'it\'s a "test" $HOME'),
    ],
)
def test_a_structured_value_can_be_given_back_as_a_flag(name: str, value: object) -> None:
    text = flag(name, value).partition("=")[2]
    checked = check_givens({name: GivenValue(text, "flag", name)}, RUN, CheckedKeys())
    assert not checked.problems
    assert RunConfig(**checked.valid) == RunConfig.model_validate({name: value})


def test_a_command_is_quoted_for_the_shell_and_a_flag_replaces_its_like() -> None:
    assert command_text("simpletuner", "sample", "--run", Path("o5/a b")) == "simpletuner sample --run 'o5/a b'"
    typed = ["--env", "cats", "--lora_rank", "8", "--use_ema", "--save_total_limit=2"]
    changed = {"lora_rank": 4, "use_ema": False, "checkpoints_total_limit": 5}
    assert with_flags(typed, changed, OPTION_ALIASES) == [
        "--env",
        "cats",
        "--lora_rank=4",
        "--use_ema=false",
        "--checkpoints_total_limit=5",
    ]


def test_paths_are_printed_by_the_one_function_that_quotes() -> None:
    """Where a command is followed by something that is known at run time only, `command_text` puts it together."""
    command = r"simpletuner (?:train|sample|server|plan|(?:run|checkpoint|config|dataset) (?!queue)[a-z]+)"
    bare = re.compile(rf"(?:{command}|chmod \d+) (?:--\w+[= ])?{UNKNOWN}")
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                literal = "".join(part.value if isinstance(part, ast.Constant) else UNKNOWN for part in node.values)
                wrong += [f"{path.relative_to(SOURCE)}:{node.lineno}: {found}" for found in bare.findall(literal)]
    assert not wrong, "\n".join(wrong)


def test_the_table_of_what_may_change_on_resume_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    quiet, steering = (
        set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", line.split(" | ")[0]))
        for line in page.splitlines()
        if " | may change; " in line
    )
    slices = (
        ValidationOptions, CheckpointOptions, TrackingOptions, ProcessOptions, RankOptions, DataOptions, OffloadOptions,
    )  # fmt: skip
    (together,) = (line.split(" | ")[0] for line in page.splitlines() if " | may change together " in line)
    assert set(re.findall(r"\w+", together)) == {*SPLIT}
    assert steering == CHANGE_THE_CURVE
    assert quiet - LEFT_TO_THE_RUN.keys() == MAY_CHANGE - {name for each in slices for name in each.model_fields}
    anchors = {str(each.__doc__).rstrip(".").lower().replace(" ", "-") for each in slices}
    assert anchors == set(re.findall(r"\(options\.md#([a-z-]+)\)", page.split(" | may change; ")[0]))
