"""`simpletuner resize`: a LoRA at a lower rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import Problem
from simpletuner.cli.arguments import Positional, parse_command
from simpletuner.cli.lora_output import LoraOutput, file_problems, layers_in_progress, tell_lora

USAGE = """usage: simpletuner resize FILE OUTPUT [--rank N] [--energy SHARE]

  Writes the LoRA in FILE at the rank that is given, or at the smallest that keeps the given share of its energy. A LoKr
  or a LoHa becomes a LoRA. A layer whose rank is not lowered keeps its numbers, but for alpha/rank, which is
  folded into B and rounded to --dtype."""


@dataclass(frozen=True)
class ResizeCommand(LoraOutput):
    """What is typed after `simpletuner resize`."""

    file: Path | None = Positional(convert=Path).default(None)
    output: Path | None = Positional(convert=Path).default(None)

    def problems(self) -> Iterator[Problem]:
        """What parsing alone does not find."""
        if self.file is None or self.output is None:
            yield Problem("simpletuner resize: a name is missing", "a LoRA and the file to write")
            return
        if not self.file.exists():
            yield Problem(f"{self.file}: no such file", "a LoRA's .safetensors file, or a folder with one")
        yield from file_problems(self.output)


FORMS = {"": ResizeCommand}


def run(arguments: list[str]) -> int:
    """Resize, and print what was written.

    Raises:
        ConfigError: a mistake in what was typed.
        CheckpointError: a file that cannot be read.
        DiskError: no space.
    """
    command = parse_command(ResizeCommand, arguments, check=ResizeCommand.problems)
    # torch, which mistakes do without.
    from simpletuner.flux2.merge import read_adapters, resized_header, unread_notices, write_merged

    assert command.file is not None
    assert command.output is not None
    adapters = read_adapters([(command.file, 1.0)])
    rule = command.rule
    header = resized_header(adapters[0].file, rule)
    written = write_merged(
        command.output, adapters, rule, command.to, header, dtype=command.torch_dtype, report=layers_in_progress
    )
    tell_lora(written, command.json, {"file": str(command.file)}, unread_notices(adapters))
    return 0
