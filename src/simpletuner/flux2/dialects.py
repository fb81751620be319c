"""Adapter files of every program: which dialect a file is in, and what it holds for each Linear."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from simpletuner.base.errors import CheckpointError
from simpletuner.base.files import file_errors_reported
from simpletuner.flux2.factors import Factors, LowRank
from simpletuner.memory.tensors import open_tensors
from simpletuner.runs.layout import LORA_NAME

_KEY = re.compile(r"transformer\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file's content."""

    path: Path
    dialect: str
    """The layout of its keys, such as "diffusers", "comfyui", "kohya"; "mixed" where it has several."""
    modules: dict[str, Factors]
    """By diffusers' name of the Linear, fused matrices cut into theirs; in the file's numbers and dtype."""
    unread: dict[str, str] = field(default_factory=dict)
    """Keys that are part of no factors above, each with what it is: "dora", "oft", "diff", "text encoder", "unknown"."""
    header: Mapping[str, str] = field(default_factory=dict)
    """The file's text fields."""


def read_adapter(path: Path) -> AdapterFile:
    """The adapter in `path`, a file or a folder that holds `pytorch_lora_weights.safetensors`.

    Raises:
        CheckpointError: no such file, damaged, or with no key that names a Linear of FLUX.2.
    """
    with file_errors_reported(path, CheckpointError, doing="read"):
        path = path / LORA_NAME if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError.of(f"no LoRA at {path}", "a .safetensors file or a run's folder")
        with open_tensors(path) as file:
            tensors, header = dict(file), file.metadata
    sides: dict[str, dict[str, Tensor]] = {}
    unread = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            unread[key] = "unknown"
        else:
            sides.setdefault(match["layer"], {})[match["side"]] = tensor
    modules: dict[str, Factors] = {name: LowRank(pair["A"], pair["B"]) for name, pair in sides.items()}
    return AdapterFile(path, "diffusers", modules, unread, header)
