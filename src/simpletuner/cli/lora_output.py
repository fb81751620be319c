"""Flags and output that merge, extract and resize share: those of the LoRA that they write."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from simpletuner.base.console import say
from simpletuner.base.errors import Problem
from simpletuner.base.sizes import format_size
from simpletuner.cli.arguments import Flag, one_of, whole_number
from simpletuner.cli.printing import json_text
from simpletuner.config.options.lora import LoraFormat
from simpletuner.config.values import join_names

if TYPE_CHECKING:
    import torch

    from simpletuner.flux2.lowrank import RankRule
    from simpletuner.flux2.merge import WrittenLora

USUAL_ENERGY = 0.99
_FORMATS: tuple[LoraFormat, ...] = get_args(LoraFormat)
_DTYPES = ("fp32", "bf16", "fp16")


def _energy(text: str) -> float:
    """Parse a share above 0 and at most 1; raises ValueError otherwise."""
    share = float(text)
    if not 0 < share <= 1:
        raise ValueError(text)
    return share


@dataclass(frozen=True)
class LoraOutput:
    """Flags of a command that computes and writes a LoRA."""

    usual_rank: ClassVar[int | None] = None
    """The maximum rank without --rank and --energy; None for no maximum."""
    rank: int | None = Flag(
        "the maximum rank of each layer",
        "N",
        convert=whole_number,
        expects="a whole number of at least 1",
        follows="a rank",
    ).default(None)
    energy: float | None = Flag(
        "keep this share of each layer's energy, the sum of its squared singular values, at the lowest possible rank; "
        f"by default {USUAL_ENERGY} without --rank. With --rank, at most that rank.",
        "SHARE",
        convert=_energy,
        expects="a number above 0, at most 1",
        follows="a number",
    ).default(None)
    to: LoraFormat = Flag(
        f"the format of the file: {join_names(_FORMATS, 'or')} (default diffusers)",
        "FORMAT",
        convert=one_of(_FORMATS),
        expects=join_names(_FORMATS, "or"),
        follows="a format",
    ).default("diffusers")
    dtype: str | None = Flag(
        "the dtype of the file: fp32, bf16 or fp16; by default the narrowest that can hold the input's values",
        "DTYPE",
        convert=one_of(_DTYPES),
        expects=join_names(_DTYPES, "or"),
        follows="a dtype",
    ).default(None)
    json: bool = Flag("print one JSON object").default(False)

    @property
    def rule(self) -> "RankRule":
        """The rank rule of --rank and --energy."""
        # Imported late: mistakes in the arguments are reported without loading torch.
        from simpletuner.flux2.lowrank import RankRule

        if self.rank is None and self.energy is None:
            return RankRule(self.usual_rank, USUAL_ENERGY)
        return RankRule(self.rank, self.energy)

    @property
    def torch_dtype(self) -> "torch.dtype | None":
        from simpletuner.memory.precision import DTYPES

        return None if self.dtype is None else DTYPES[self.dtype]


def file_problems(output: Path, flag: str = "") -> Iterator[Problem]:
    """Problems with the path of a .safetensors file to write. Messages put `flag` before the path."""
    typed = f"{flag} {output}".lstrip()
    if output.suffix != ".safetensors":
        yield Problem(f"{typed} does not end in .safetensors", "the name of a file to write")
    elif os.path.lexists(output):
        yield Problem(f"{typed} exists already", "a new name", "Remove it first, or choose another name.")
    elif not output.absolute().parent.is_dir():
        yield Problem(f"{typed}: the folder {output.parent} does not exist", "an existing folder")


def layers_in_progress(layers: Iterable[str]) -> Iterable[str]:
    """`layers`, with a progress bar on a terminal."""
    # Imported late, because the import is slow: only when there is progress to show.
    from tqdm import tqdm

    names = list(layers)
    bar: Iterable[str] = tqdm(names, desc="layers", unit="layer", disable=None)
    return bar


def print_lora(written: "WrittenLora", is_json: bool, inputs: dict[str, Any], notices: Iterable[str] = ()) -> None:
    """Print a summary of the LoRA that was written. `inputs` are added to the JSON object."""
    size = written.path.stat().st_size
    low, high = written.ranks
    if is_json:
        fields = {
            "output": str(written.path),
            "bytes": size,
            "layers": written.layers,
            "ranks": [low, high],
            "kept": written.kept_energy,
            "lost": written.losses_by_loader,
            "notices": list(notices),
        }
        say(json_text(fields | inputs))
        return
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    energy = (
        "all of its energy"
        if written.kept_energy > 1 - 1e-9
        else f"at least {100 * written.kept_energy:.2f} % of each layer's energy"
    )
    say(f"LoRA: {written.path} ({format_size(size)}), {written.layers} layers of {ranks}, with {energy}")
    for loader, names in written.losses_by_loader.items():
        say(f"{loader} does not apply {len(names)} of the LoRA's layers as trained, such as {names[0]}.")
    for notice in notices:
        say(notice)
