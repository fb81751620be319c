"""`simpletuner merge`: add several LoRAs, into one LoRA or into the weights of a model."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.base.console import say
from simpletuner.base.errors import Problem
from simpletuner.base.sizes import format_size
from simpletuner.cli.arguments import Flag, parse_command
from simpletuner.cli.lora_output import LoraOutput, file_problems, layers_in_progress, print_lora
from simpletuner.cli.printing import json_text
from simpletuner.cli.sample import LoraWithStrength, parse_lora

if TYPE_CHECKING:
    from simpletuner.flux2.merge import WeightedAdapter

USAGE = """usage: simpletuner merge --lora FILE[:STRENGTH] [...] --output FILE [--rank N] [--energy SHARE]
       simpletuner merge --lora FILE[:STRENGTH] [...] --into MODEL --output PATH

  Writes the sum of LoRAs, LoKrs and LoHas, each times its STRENGTH (by default 1), as one LoRA. At full rank
  (--energy 1) it has the same effect as all of them together.

  With --into, adds the sum to the weights of a model instead: a diffusers folder, or a single file. PATH is a
  transformer's folder as diffusers saves it, or a .safetensors file in BFL's layout, which ComfyUI loads. The weights
  of a quantized model become bf16."""
_LORA_FLAGS = ("rank", "energy", "dtype")
"""Flags that do not apply with --into."""


@dataclass(frozen=True)
class MergeCommand(LoraOutput):
    """Arguments of `simpletuner merge`."""

    lora: tuple[LoraWithStrength, ...] = Flag(
        "a file, or a folder with pytorch_lora_weights.safetensors; repeat the flag for each. FILE:0.8 sets the "
        "strength; a LoRA with a strength below 0 is subtracted",
        "FILE[:STRENGTH]",
        convert=parse_lora,
        follows="a file",
        is_repeatable=True,
    ).default(())
    into: Path | None = Flag(
        "add the LoRAs to the weights of this model", "MODEL", convert=Path, follows="a model"
    ).default(None)
    output: Path | None = Flag("the file or folder to write", "PATH", convert=Path, follows="a path").default(None)

    @property
    def loras_as_json(self) -> list[dict[str, object]]:
        """The LoRAs with their strengths, as JSON."""
        return [{"file": str(lora.path), "strength": lora.strength} for lora in self.lora]

    def problems(self) -> Iterator[Problem]:
        """Problems that parsing alone does not find."""
        if not self.lora:
            yield Problem("no --lora is given", "one or more files")
        for lora in self.lora:
            if not os.path.exists(lora.path):
                yield Problem(f"--lora {lora.path}: no such file", "a .safetensors file, or a folder with one")
            if not math.isfinite(lora.strength):
                yield Problem(f"--lora {lora.path}: a strength of {lora.strength}", "a finite number, such as 0.8")
        if self.output is None:
            yield Problem("no --output is given", "the file to write")
        elif self.into is None:
            yield from file_problems(self.output, "--output")
        if self.into is not None:
            if not self.into.exists():
                yield Problem(f"--into {self.into}: no such file", "a model's file or folder")
            for name in _LORA_FLAGS:
                if getattr(self, name) is not None:
                    yield Problem(f"--{name} with --into", "one of them", f"--{name} is for a LoRA, not for a model.")
            if self.to != "diffusers":
                yield Problem(
                    f"--to {self.to} with --into", "one of them", "The name of --output determines the layout."
                )


FORMS = {"": MergeCommand}


def run(arguments: list[str]) -> int:
    """Write the merged LoRA or model and print a summary.

    Raises:
        ConfigError: a mistake in the arguments.
        CheckpointError: a LoRA cannot be read, or does not fit the model.
        AccessError: the model cannot be read.
        DiskError: no space.
    """
    command = parse_command(MergeCommand, arguments, check=MergeCommand.problems)
    # Imported late: mistakes in the arguments are reported without loading torch.
    from simpletuner.flux2.merge import merged_header, read_adapters, unread_notices, write_merged

    assert command.output is not None
    adapters = read_adapters([(lora.path, lora.strength) for lora in command.lora])
    if command.into is not None:
        _merge_into(command.into, command.output, adapters, command)
        return 0
    rule = command.rule
    written = write_merged(
        command.output,
        adapters,
        rule,
        command.to,
        merged_header(adapters, rule),
        dtype=command.torch_dtype,
        report=layers_in_progress,
    )
    print_lora(written, command.json, {"loras": command.loras_as_json}, unread_notices(adapters))
    return 0


def _merge_into(model: Path, output: Path, adapters: "list[WeightedAdapter]", command: MergeCommand) -> None:
    """Add `adapters` to the weights of `model` and print a summary."""
    from tqdm import tqdm

    from simpletuner.flux2.merge import merge_into, parts_by_layer, unread_notices

    layers = len(parts_by_layer(adapters))
    with tqdm(total=layers, desc="layers", unit="layer", disable=None) as bar:
        written = merge_into(model, output, adapters, report=lambda _: bar.update())
    notices = unread_notices(adapters)
    if written.left_out:
        notices.append(f"{written.left_out} tensors of {model} belong to other components and are not in it.")
    if command.json:
        fields = {"output": str(written.path), "bytes": written.bytes, "layers": layers, "notices": notices}
        say(json_text(fields | {"loras": command.loras_as_json, "into": str(model)}))
        return
    say(f"Model: {written.path} ({format_size(written.bytes)}), {layers} layers changed")
    for notice in notices:
        say(notice)
