"""`simpletuner resize`: write a LoRA at a lower rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import Problem
from simpletuner.cli.arguments import Positional, parse_command
from simpletuner.cli.lora_output import LoraOutput, file_problems, layers_in_progress, print_lora

USAGE = """usage: simpletuner resize FILE OUTPUT [--rank N] [--energy SHARE]

  Writes the LoRA in FILE at rank N, or at the lowest rank that keeps SHARE of its energy. A LoKr or a LoHa becomes a
  LoRA. A layer whose rank stays the same keeps its values, except that alpha/rank is folded into B and rounded to
  --dtype."""


@dataclass(frozen=True)
class ResizeCommand(LoraOutput):
    """Arguments of `simpletuner resize`."""

    file: Path | None = Positional(convert=Path).default(None)
    output: Path | None = Positional(convert=Path).default(None)

    def problems(self) -> Iterator[Problem]:
        """Problems that parsing alone does not find."""
        if self.file is None or self.output is None:
            yield Problem("simpletuner resize: a name is missing", "a LoRA and the file to write")
            return
        if not self.file.exists():
            yield Problem(f"{self.file}: no such file", "a LoRA's .safetensors file, or a folder with one")
        yield from file_problems(self.output)


FORMS = {"": ResizeCommand}


def run(arguments: list[str]) -> int:
    """Write the LoRA at the lower rank and print a summary.

    Raises:
        ConfigError: a mistake in the arguments.
        CheckpointError: the file cannot be read.
        DiskError: no space.
    """
    command = parse_command(ResizeCommand, arguments, check=ResizeCommand.problems)
    # Imported late: mistakes in the arguments are reported without loading torch.
    from simpletuner.flux2.merge import read_adapters, resized_header, unread_notices, write_merged

    assert command.file is not None
    assert command.output is not None
    adapters = read_adapters([(command.file, 1.0)])
    rule = command.rule
    header = resized_header(adapters[0].file, rule)
    written = write_merged(
        command.output, adapters, rule, command.to, header, dtype=command.torch_dtype, report=layers_in_progress
    )
    print_lora(written, command.json, {"file": str(command.file)}, unread_notices(adapters))
    return 0
