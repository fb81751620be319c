"""Help texts that fit the terminal's width: a command's usage, its flags, and the options of `train`."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from simpletuner.base.commandline import command_text
from simpletuner.base.errors import ConfigError
from simpletuner.cli.arguments import flag_rows
from simpletuner.cli.printing import fitted, items_of, plain, rows_text, wrapped
from simpletuner.config.flags import SELECTORS
from simpletuner.config.options.kinds import Slice
from simpletuner.config.run import OPTION_NAMES, SLICES
from simpletuner.config.values import kinds, nearest, value_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Forms = Mapping[str, type[DataclassInstance] | Mapping[str, type[DataclassInstance]]]

ESSENTIALS = (
    "model_flavour",
    "model_type",
    "pretrained_model_name_or_path",
    "data_backend_config",
    "output_dir",
    "lora_rank",
    "learning_rate",
    "optimizer",
    "max_train_steps",
    "train_batch_size",
    "gradient_checkpointing",
    "base_model_precision",
    "validation_step_interval",
    "checkpoint_step_interval",
    "resume_from_checkpoint",
    "seed",
)
"""Options of `train` that most configurations set."""

_SELECTOR_VALUES = {"config": "PATH", "like": "FILE"}
"""Placeholder for the value of each selector that does not take a NAME."""

ALL = "all"
"""`--help all` explains every option."""


def requested_help(arguments: Sequence[str]) -> str | None:
    """The topic of `--help=WORD` or `--help WORD`; "" for `--help` alone; None without `--help`."""
    for index, argument in enumerate(arguments):
        name, _, word = argument.partition("=")
        if name in ("--help", "-h"):
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            return word or ("" if following.startswith("-") else following)
    return None


def command_help(usage: str, forms: "Forms", arguments: Sequence[str]) -> str:
    """Help of a command, or of one verb if `arguments` begin with it or name it after `--help`.

    Args:
        usage: usage lines that begin with `simpletuner`, then rows of a verb and its description, then prose.
        forms: the form of each verb's arguments; a command without verbs has the verb "".
    """
    verb = next((word for word in (*arguments[:1], requested_help(arguments)) if word and word in forms), "")
    described = forms_of({verb: forms[verb]} if verb else forms)
    parts = [fitted(_of_verb(usage, verb, forms))]
    if rows := flag_rows(described, "" if verb and isinstance(forms[verb], Mapping) else verb):
        parts.append(rows_text(rows))
    if any(each.name == "train_options" for form in described for each in fields(form)):
        parts.append(
            fitted(
                "Also takes the options of `train`, such as --env NAME or --config PATH: see simpletuner train --help"
            )
        )
    return "\n\n".join(parts)


def forms_of(forms: "Forms") -> list[type["DataclassInstance"]]:
    """The forms of all verbs, each once."""
    distinct: dict[type[DataclassInstance], None] = {}
    for form in forms.values():
        distinct |= dict.fromkeys(forms_of(form) if isinstance(form, Mapping) else [form])
    return list(distinct)


def train_help(usage: str, word: str) -> str:
    """Help of `train`: the options that most configurations set, and the names of all options. With a `word`, help of
    each option whose name, group or text contains it.

    Raises:
        ConfigError: no option matches `word`.
    """
    if word:
        return "\n\n".join(_matching_options(word))
    parts = [
        fitted(usage),
        "Selecting a configuration\n"
        + rows_text({f"--{name} {_SELECTOR_VALUES.get(name, 'NAME')}": text for name, text in SELECTORS.items()}),
        "Options that most configurations set\n" + option_entries(ESSENTIALS, is_short=True),
        fitted(f"All {len(OPTION_NAMES)} options"),
    ]
    parts += [f"{fitted(_title(group))}\n{wrapped(', '.join(group.model_fields), 2, 2)}" for group in SLICES]
    parts.append(
        rows_text(
            {
                "simpletuner train --help WORD": "explains the options about WORD, such as lora_rank or validation",
                command_text("simpletuner", "train", "--help", ALL): "explains all options, as docs/options.md does",
            }
        )
    )
    return "\n\n".join(parts)


def option_entries(names: Sequence[str], groups: Sequence[type[Slice]] = SLICES, *, is_short: bool = False) -> str:
    """Help entries of the options `names`: the values that each takes and its meaning; with `is_short`, only the first
    sentence of the meaning."""
    return "\n".join(_entry(group, name, is_short=is_short) for name, group in _with_groups(groups, names))


def _with_groups(groups: Sequence[type[Slice]], names: Sequence[str]) -> Iterator[tuple[str, type[Slice]]]:
    """Each option with its group."""
    return ((name, group) for name in names for group in groups if name in group.model_fields)


def _entry(group: type[Slice], name: str, *, is_short: bool) -> str:
    field = group.model_fields[name]
    has_default = not field.is_required() and field.default not in (None, "", ())
    default = f" (default {value_text(field.default)})" if has_default else ""
    text = plain(_texts(group)[name])
    if is_short:
        text = re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
    head = wrapped(f"--{name}: {kinds(group)[name].expects}{default}", 2, 6)
    return "\n".join((head, *(wrapped(line, 6, 6) for line in text.split("\n\n"))))


def _matching_options(word: str) -> Iterator[str]:
    option = word.lower().removeprefix("--").replace("-", "_")
    if option in OPTION_NAMES:
        yield option_entries([option])
        return
    has_match = False
    for group in SLICES:
        is_group = option in (ALL, _title(group).lower().replace(" ", "_"))
        texts = _texts(group)
        names = [name for name in texts if is_group or option in name or word.lower() in texts[name].lower()]
        if names:
            has_match = True
            yield f"{fitted(_title(group))}\n{option_entries(names)}"
    if not has_match:
        near = nearest(option, OPTION_NAMES)
        remedy = f"Did you mean --help {near}?" if near else "`simpletuner train --help` lists all options."
        typed = command_text("simpletuner", "train", "--help", word)
        raise ConfigError.of(f"{typed}: no option matches", remedy=remedy)


@functools.cache
def _texts(group: type[Slice]) -> dict[str, str]:
    """The documentation of each option in the group; cached, because it is parsed from the source."""
    return group.documentation()


def _title(group: type[Slice]) -> str:
    return str(group.__doc__).rstrip(".")


def _of_verb(usage: str, verb: str, forms: Mapping[str, object]) -> str:
    """The items of `usage` about `verb`, and those about no verb; without a verb, all."""
    if not verb:
        return usage
    blocks = []
    for block in usage.strip("\n").split("\n\n"):
        items = []
        for item, _ in items_of(block.splitlines()):
            words = item.removeprefix("usage:").split()
            verbs = words[2].split("|") if words[0] == "simpletuner" else words[:1]
            if verb in verbs or not forms.keys() & set(verbs):
                items.append(item)
        blocks.append("\n".join(items))
    lines = "\n\n".join(filter(None, blocks)).lstrip().removeprefix("usage:").lstrip()
    return f"usage: {lines}"
