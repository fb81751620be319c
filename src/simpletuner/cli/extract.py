"""`simpletuner extract`: write the difference of two models as a LoRA."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from simpletuner.base.errors import Problem
from simpletuner.cli.arguments import Positional, parse_command
from simpletuner.cli.lora_output import LoraOutput, file_problems, layers_in_progress, print_lora

USAGE = """usage: simpletuner extract BASE TUNED OUTPUT [--rank N] [--energy SHARE]

  Writes the difference TUNED - BASE of two models as a LoRA, as closely as the rank allows. Each model is a transformer
  in a single file, in a diffusers folder, or in the folder of a whole pipeline. Without --rank and --energy, each layer
  keeps 99 % of its energy, up to rank 64."""


@dataclass(frozen=True)
class ExtractCommand(LoraOutput):
    """Arguments of `simpletuner extract`."""

    # Full training changes every direction a little. A LoRA with 99 % of the energy would be larger than the model.
    usual_rank: ClassVar[int | None] = 64
    base: Path | None = Positional(convert=Path).default(None)
    tuned: Path | None = Positional(convert=Path).default(None)
    output: Path | None = Positional(convert=Path).default(None)

    def problems(self) -> Iterator[Problem]:
        """Problems that parsing alone does not find."""
        if self.base is None or self.tuned is None or self.output is None:
            yield Problem("simpletuner extract: a name is missing", "a base model, a tuned model and the file to write")
            return
        for model in (self.base, self.tuned):
            if not model.exists():
                yield Problem(f"{model}: no such file", "a model's file or folder")
        yield from file_problems(self.output)


FORMS = {"": ExtractCommand}


def run(arguments: list[str]) -> int:
    """Write the LoRA and print a summary.

    Raises:
        ConfigError: a mistake in the arguments.
        AccessError: a model cannot be read.
        CheckpointError: the models have different flavours, or are equal.
        DiskError: no space.
    """
    command = parse_command(ExtractCommand, arguments, check=ExtractCommand.problems)
    # Imported late: mistakes in the arguments are reported without loading torch.
    from simpletuner.flux2.extract import differences, extracted_header
    from simpletuner.flux2.merge import write_layers
    from simpletuner.flux2.transformer_file import opened_transformer
    from simpletuner.memory.device import choose_device

    assert command.base is not None
    assert command.tuned is not None
    assert command.output is not None
    rule = command.rule
    with opened_transformer(command.base) as base, opened_transformer(command.tuned) as tuned:
        difference = differences(base, tuned, rule, choose_device(), layers_in_progress)
        header = extracted_header(base, tuned, rule)
        dtype = command.torch_dtype or difference.dtype
        written = write_layers(command.output, difference.layers, command.to, header, dtype)
    notices = []
    if difference.other_differences:
        name, largest = max(difference.other_differences.items(), key=lambda item: item[1])
        notices.append(
            f"{len(difference.other_differences)} weights that a LoRA cannot hold differ, by at most {largest:.3g} "
            f"({name}): the base with the LoRA is not exactly the tuned model."
        )
    print_lora(written, command.json, {"base": str(command.base), "tuned": str(command.tuned)}, notices)
    return 0
