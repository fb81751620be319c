"""Help as a terminal shows it: a command's usage, its own flags, then the options of `train`; no wider than it is."""

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
from simpletuner.config.values import kinds, nearest, shown

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

_NAMED = {"config": "PATH", "like": "FILE"}
"""What a selector takes, where that is no name."""

ALL = "all"
"""The word after `--help` that asks for every option."""


def help_asked(arguments: Sequence[str]) -> str | None:
    """What help is asked for: the word of `--help=WORD` or `--help WORD`, "" for help as such; None for no help."""
    for place, argument in enumerate(arguments):
        name, _, word = argument.partition("=")
        if name in ("--help", "-h"):
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            return word or ("" if following.startswith("-") else following)
    return None


def command_help(usage: str, forms: "Forms", arguments: Sequence[str]) -> str:
    """Help of a command, or of the verb that `arguments` begin with or that is named after `--help`.

    Args:
        usage: lines of usage that begin with `simpletuner`, then rows with a verb and what it does, then prose.
        forms: what may be typed after each verb; the verb of a command without verbs is "".
    """
    verb = next((word for word in (*arguments[:1], help_asked(arguments)) if word and word in forms), "")
    described = forms_of({verb: forms[verb]} if verb else forms)
    parts = [fitted(_of_verb(usage, verb, forms))]
    if rows := flag_rows(described, "" if verb and isinstance(forms[verb], Mapping) else verb):
        parts.append(rows_text(rows))
    if any(each.name == "rest" for form in described for each in fields(form)):
        parts.append(fitted("The options of `train`, such as --env NAME or --config PATH: simpletuner train --help"))
    return "\n\n".join(parts)


def forms_of(forms: "Forms") -> list[type["DataclassInstance"]]:
    """The forms of all verbs, each once."""
    found: dict[type[DataclassInstance], None] = {}
    for form in forms.values():
        found |= dict.fromkeys(forms_of(form) if isinstance(form, Mapping) else [form])
    return list(found)


def train_help(usage: str, word: str) -> str:
    """Help of `train`: which options most configurations set, and the names of all; with a `word`, what the options
    mean whose name, group or text holds it.

    Raises:
        ConfigError: no option is about `word`.
    """
    if word:
        return "\n\n".join(_found(word))
    parts = [
        fitted(usage),
        "Which configuration is read\n"
        + rows_text({f"--{name} {_NAMED.get(name, 'NAME')}": text for name, text in SELECTORS.items()}),
        "Options that most configurations set\n" + option_entries(ESSENTIALS, is_short=True),
        fitted(f"All {len(OPTION_NAMES)} options"),
    ]
    parts += [f"{fitted(_title(group))}\n{wrapped(', '.join(group.model_fields), 2, 2)}" for group in SLICES]
    parts.append(
        rows_text(
            {
                "simpletuner train --help WORD": "explains the options about WORD, such as lora_rank or validation",
                command_text("simpletuner", "train", "--help", ALL): "explains all; docs/options.md has them too",
            }
        )
    )
    return "\n\n".join(parts)


def option_entries(names: Sequence[str], groups: Sequence[type[Slice]] = SLICES, *, is_short: bool = False) -> str:
    """What each of the options `names` of `groups` takes and means; `is_short` for the first sentence of it alone."""
    return "\n".join(_entry(group, name, is_short=is_short) for name, group in _places(groups, names))


def _places(groups: Sequence[type[Slice]], names: Sequence[str]) -> Iterator[tuple[str, type[Slice]]]:
    return ((name, group) for name in names for group in groups if name in group.model_fields)


def _entry(group: type[Slice], name: str, *, is_short: bool) -> str:
    field = group.model_fields[name]
    is_telling = not field.is_required() and field.default not in (None, "", ())
    default = f" (default {shown(field.default)})" if is_telling else ""
    text = plain(_texts(group)[name])
    if is_short:
        text = re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
    head = wrapped(f"--{name}: {kinds(group)[name].expects}{default}", 2, 6)
    return "\n".join((head, *(wrapped(line, 6, 6) for line in text.split("\n\n"))))


def _found(word: str) -> Iterator[str]:
    wanted = word.lower().removeprefix("--").replace("-", "_")
    if wanted in OPTION_NAMES:
        yield option_entries([wanted])
        return
    is_any = False
    for group in SLICES:
        is_group = wanted in (ALL, _title(group).lower().replace(" ", "_"))
        texts = _texts(group)
        names = [name for name in texts if is_group or wanted in name or word.lower() in texts[name].lower()]
        if names:
            is_any = True
            yield f"{fitted(_title(group))}\n{option_entries(names)}"
    if not is_any:
        near = nearest(wanted, OPTION_NAMES)
        remedy = f"Did you mean --help {near}?" if near else "`simpletuner train --help` names all."
        typed = command_text("simpletuner", "train", "--help", word)
        raise ConfigError.of(f"{typed}: no option is about that", remedy=remedy)


@functools.cache
def _texts(group: type[Slice]) -> dict[str, str]:
    """The group's documentation, which it reads from its source."""
    return group.documentation()


def _title(group: type[Slice]) -> str:
    return str(group.__doc__).rstrip(".")


def _of_verb(usage: str, verb: str, forms: Mapping[str, object]) -> str:
    """The parts of `usage` that are about `verb`; all without one."""
    if not verb:
        return usage
    blocks = []
    for block in usage.strip("\n").split("\n\n"):
        kept = []
        for item, _ in items_of(block.splitlines()):
            words = item.removeprefix("usage:").split()
            verbs = words[2].split("|") if words[0] == "simpletuner" else words[:1]
            if verb in verbs or not forms.keys() & set(verbs):
                kept.append(item)
        blocks.append("\n".join(kept))
    lines = "\n\n".join(filter(None, blocks)).lstrip().removeprefix("usage:").lstrip()
    return f"usage: {lines}"
