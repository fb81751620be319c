"""`simpletuner convert`: a LoRA or a model under the names that another program wants."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from simpletuner.base.console import complain, say
from simpletuner.base.errors import CheckpointError, ConfigError, Problem
from simpletuner.base.sizes import format_size
from simpletuner.cli.arguments import Flag, Positional, parse_command
from simpletuner.cli.lora_output import file_problems
from simpletuner.cli.printing import json_text
from simpletuner.config.options.lora import LoraFormat
from simpletuner.config.values import join_names, nearest

USAGE = """usage: simpletuner convert IN OUT --to diffusers|comfyui|bfl|kohya [--allow-loss] [--json]

  IN is a LoRA file of any program, or a run's folder with one; or a whole model: a diffusers folder, or a single file.
  OUT is the file or folder to write; nothing may be there. What is written is read back and compared.

  diffusers   diffusers' names. Of a LoRA, ComfyUI reads all but a few layers outside the blocks; of a model, nothing
  comfyui     BFL's names as ComfyUI writes them: every layer. Of a model: BFL's single file, with which ComfyUI starts
  bfl         BFL's names as PEFT writes them, for programs that train on BFL's model. Of a model: as comfyui
  kohya       BFL's names as kohya's scripts and musubi-tuner write them; LoRAs only

  A LoRA has the same effect in each of them, and one of simpletuner's comes back bit for bit.
"""
_FORMATS: Mapping[str, LoraFormat] = {name: name for name in get_args(LoraFormat)}
"""What may follow --to."""


@dataclass(frozen=True)
class ConvertCommand:
    """What is typed after `simpletuner convert`."""

    source: Path | None = Positional(convert=Path).default(None)
    target: Path | None = Positional(convert=Path).default(None)
    to: str = Flag("the format of OUT", "FORMAT").default("")
    allow_loss: bool = Flag(
        "write a LoRA even where diffusers or ComfyUI would leave layers of it out,\n"
        "or where IN holds more than a LoRA of the transformer"
    ).default(False)
    json: bool = Flag("print one JSON object").default(False)


FORMS = {"": ConvertCommand}


def run(arguments: list[str]) -> int:
    """Convert one file or folder.

    Raises:
        ConfigError: a mistake in what was typed, or something is at OUT.
        CheckpointError: IN cannot be read, or would lose something.
        DiskError: no space.
    """
    command = parse_command(ConvertCommand, arguments, check=_mistakes)
    assert command.source is not None
    assert command.target is not None
    if not command.source.exists():
        raise CheckpointError.of(f"no file or folder at {command.source}", "a LoRA, or a model")
    # Their imports load torch, which a mistake above need not wait for.
    from simpletuner.flux2.convert_model import holds_model

    if holds_model(command.source):
        if command.allow_loss:
            complain("--allow-loss has no effect: it is for LoRAs, and IN is a model.")
        told, lines = _convert_model(command.source, command.target, command.to)
    else:
        told, lines = _convert_lora(command.source, command.target, _FORMATS[command.to], command.allow_loss)
    say(json_text(told) if command.json else "\n".join(lines))
    return 0


def _mistakes(command: ConvertCommand) -> Iterator[Problem]:
    if command.source is None or command.target is None:
        usage = "See `simpletuner convert --help`."
        yield Problem("simpletuner convert: what or where to is not said", "IN and OUT", usage)
    if command.to not in _FORMATS:
        near = nearest(command.to, _FORMATS)
        found = f"--to = {command.to!r}" if command.to else "--to is not given"
        yield Problem(found, join_names(_FORMATS, "or"), f"Did you mean --to {near}?" if near else "")


def _convert_model(source: Path, target: Path, to: str) -> tuple[dict[str, Any], list[str]]:
    from simpletuner.flux2.convert_model import convert_model

    made = convert_model(source, target, to)
    told = {
        "kind": "model",
        "source": str(source),
        "target": str(made.path),
        "to": to,
        "tensors": made.tensors,
        "bytes": made.bytes,
        "left_out": made.left_out,
    }
    lines = [f"{made.path}: a transformer of {made.tensors} tensors, {format_size(made.bytes)}"]
    if made.left_out:
        lines.append(f"{made.left_out} tensors of {source} belong to other components and are not in it.")
    return told, lines


def _convert_lora(source: Path, target: Path, to: LoraFormat, allow_loss: bool) -> tuple[dict[str, Any], list[str]]:
    from simpletuner.flux2.dialects import read_adapter
    from simpletuner.flux2.lora_formats import LORA_FORMATS, lora_modules, loss_texts, losses, write_adapter

    ConfigError.raise_if(file_problems(target))
    file = read_adapter(source)
    modules = lora_modules(file)
    texts = loss_texts(modules, to)
    unread = f"{file.path} holds {len(file.unread)} keys that are no layers of a LoRA on the transformer"
    if not allow_loss:
        remedy = "Give --allow-loss to write it all the same."
        problems = [
            Problem(text, remedy=remedy) for loader, text in texts.items() if loader in LORA_FORMATS[to].readers
        ]
        if file.unread:
            key, kind = next(iter(file.unread.items()))
            problems.append(Problem(f"{unread}, such as {key} ({kind})", remedy="Give --allow-loss to leave them out."))
        CheckpointError.raise_if(problems)
    write_adapter(target, modules, to, file.header)
    size = target.stat().st_size
    told = {
        "kind": "lora",
        "source": str(file.path),
        "target": str(target),
        "from": file.dialect,
        "to": to,
        "layers": len(modules),
        "bytes": size,
        "losses": losses(modules, to),
        "left_out": file.unread,
    }
    lines = [f"{target}: a LoRA on {len(modules)} layers in the {to} format, {format_size(size)}"]
    if file.unread:
        lines.append(f"{unread}: they are left out.")
    return told, [*lines, *texts.values()]
