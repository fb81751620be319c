"""`simpletuner convert`: write a LoRA or a model in another program's format."""

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

  IN is a LoRA file of any program, a run's folder with one, or a whole model: a diffusers folder or a single file.
  OUT is the file or folder to write and must not exist. The command reads OUT back and compares it with IN.

  diffusers   diffusers' names. ComfyUI loads such LoRAs except for a few layers outside the blocks, but no models
  comfyui     BFL's names as ComfyUI writes them, for all layers. A model becomes BFL's single file, which ComfyUI loads
  bfl         BFL's names as PEFT writes them, for programs that train BFL's model. A model becomes the same as comfyui
  kohya       BFL's names as kohya's scripts and musubi-tuner write them; LoRAs only

  A LoRA has the same effect in every format. For a LoRA of simpletuner, a round trip through
  any format is bit-identical.
"""
_FORMATS: Mapping[str, LoraFormat] = {name: name for name in get_args(LoraFormat)}
"""The values of --to."""


@dataclass(frozen=True)
class ConvertCommand:
    """Arguments of `simpletuner convert`."""

    source: Path | None = Positional(convert=Path).default(None)
    target: Path | None = Positional(convert=Path).default(None)
    to: str = Flag("the format of OUT", "FORMAT").default("")
    allow_loss: bool = Flag(
        "write a LoRA even if diffusers or ComfyUI ignores some of its layers,\n"
        "or if IN holds more than a LoRA of the transformer"
    ).default(False)
    json: bool = Flag("print one JSON object").default(False)


FORMS = {"": ConvertCommand}


def run(arguments: list[str]) -> int:
    """Convert one file or folder.

    Raises:
        ConfigError: a mistake in the arguments, or OUT exists.
        CheckpointError: IN cannot be read, or the conversion would lose layers.
        DiskError: no space.
    """
    command = parse_command(ConvertCommand, arguments, check=_mistakes)
    assert command.source is not None
    assert command.target is not None
    if not command.source.exists():
        raise CheckpointError.of(f"no file or folder at {command.source}", "a LoRA, or a model")
    # Imported late: the mistakes above are reported without loading torch.
    from simpletuner.flux2.convert_model import holds_model

    if holds_model(command.source):
        if command.allow_loss:
            complain("--allow-loss has no effect: it is for LoRAs, and IN is a model.")
        fields, lines = _convert_model(command.source, command.target, command.to)
    else:
        fields, lines = _convert_lora(command.source, command.target, _FORMATS[command.to], command.allow_loss)
    say(json_text(fields) if command.json else "\n".join(lines))
    return 0


def _mistakes(command: ConvertCommand) -> Iterator[Problem]:
    if command.source is None or command.target is None:
        usage = "See `simpletuner convert --help`."
        yield Problem("simpletuner convert: IN or OUT is missing", "IN and OUT", usage)
    if command.to not in _FORMATS:
        near = nearest(command.to, _FORMATS)
        found = f"--to = {command.to!r}" if command.to else "--to is not given"
        yield Problem(found, join_names(_FORMATS, "or"), f"Did you mean --to {near}?" if near else "")


def _convert_model(source: Path, target: Path, to: str) -> tuple[dict[str, Any], list[str]]:
    from simpletuner.flux2.convert_model import convert_model

    model = convert_model(source, target, to)
    fields = {
        "kind": "model",
        "source": str(source),
        "target": str(model.path),
        "to": to,
        "tensors": model.tensors,
        "bytes": model.bytes,
        "left_out": model.left_out,
    }
    lines = [f"{model.path}: a transformer of {model.tensors} tensors, {format_size(model.bytes)}"]
    if model.left_out:
        lines.append(f"{model.left_out} tensors of {source} belong to other components and are not in it.")
    return fields, lines


def _convert_lora(source: Path, target: Path, to: LoraFormat, allow_loss: bool) -> tuple[dict[str, Any], list[str]]:
    from simpletuner.flux2.dialects import read_adapter
    from simpletuner.flux2.lora_formats import (
        LORA_FORMATS,
        lora_modules,
        lost_layer_messages,
        lost_layers,
        write_adapter,
    )

    ConfigError.raise_if(file_problems(target))
    file = read_adapter(source)
    modules = lora_modules(file)
    texts = lost_layer_messages(modules, to)
    unread = f"{file.path} contains {len(file.unread)} keys that are not layers of a LoRA on the transformer"
    if not allow_loss:
        remedy = "Give --allow-loss to write it anyway."
        problems = [
            Problem(text, remedy=remedy) for loader, text in texts.items() if loader in LORA_FORMATS[to].readers
        ]
        if file.unread:
            key, kind = next(iter(file.unread.items()))
            problems.append(Problem(f"{unread}, such as {key} ({kind})", remedy="Give --allow-loss to leave them out."))
        CheckpointError.raise_if(problems)
    write_adapter(target, modules, to, file.header)
    size = target.stat().st_size
    fields = {
        "kind": "lora",
        "source": str(file.path),
        "target": str(target),
        "from": file.dialect,
        "to": to,
        "layers": len(modules),
        "bytes": size,
        "losses": lost_layers(modules, to),
        "left_out": file.unread,
    }
    lines = [f"{target}: a LoRA on {len(modules)} layers in the {to} format, {format_size(size)}"]
    if file.unread:
        lines.append(f"{unread}: they are left out.")
    return fields, [*lines, *texts.values()]
