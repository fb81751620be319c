"""A quantized base model on disk, so that the next start need not quantize it again."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.base.files import file_errors_reported, read_json, sha256_file, sha256_json, write_json
from simpletuner.base.parts import locked_part, sweep_parts
from simpletuner.flux2.source import Source
from simpletuner.memory.precision import library_version
from simpletuner.memory.tensors import save_tensors

_FORMAT = "1"
"""Of the tensors' names and meaning: another number, and what is kept is made again."""


@dataclass(frozen=True)
class KeptBase:
    """Two files of one name in `folder`: the tensors, and a manifest of what they were made from and of their bytes.
    The manifest is written last, so without one there is nothing."""

    folder: Path
    about: Mapping[str, str]
    content: str
    """The fingerprint of all bytes of the transformer that it was made from."""

    @classmethod
    def of(cls, folder: Path, source: Source, precision: str, dtype: torch.dtype) -> "KeptBase":
        about = {
            "format": _FORMAT,
            "source": source.fingerprint("transformer"),
            "precision": precision,
            "dtype": str(dtype).removeprefix("torch."),
            "library": library_version(precision),
        }
        return cls(folder, about, source.fingerprint("transformer", whole=True))

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.about['precision']}-{sha256_json(dict(self.about))[:16]}.safetensors"

    @property
    def manifest(self) -> Path:
        return self.weights.with_suffix(".json")

    def verified(self, report: Callable[[str], None]) -> Path | None:
        """The file of tensors, if it is what its manifest says and the manifest is ours; `report` is told if not.

        What a killed process left half-written is removed.
        """
        sweep_parts(self.folder, ".*.safetensors.*.part")
        if not self.manifest.exists():
            return None
        damage = self._damage()
        if damage is None:
            return self.weights
        report(f"The quantized base in {self.folder} is not used, and made again: {damage}.")
        return None

    def _damage(self) -> str | None:
        try:
            manifest = read_json(self.manifest)
            about, size, digest = manifest["about"], manifest["bytes"], manifest["sha256"]
            # A release that wrote none knew the first 4 KiB of each tensor, which `about` names.
            content = manifest.get("content", self.content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return f"{self.manifest.name} cannot be read"
        if about != self.about:
            return f"{self.manifest.name} is of another model or precision"
        if content != self.content:
            return f"the transformer's weights are not those that {self.weights.name} was made from"
        if not self.weights.is_file():
            return f"{self.weights.name} is missing"
        if self.weights.stat().st_size != size or sha256_file(self.weights) != digest:
            return f"{self.weights.name} does not have the bytes that were written"
        return None

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Write `tensors`, one after the other.

        Raises:
            DiskError: no space; nothing is left behind.
        """
        with file_errors_reported(self.weights):
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked_part(self.weights) as part:
                save_tensors(part, tensors, {})
                size, digest = part.stat().st_size, sha256_file(part)
                os.replace(part, self.weights)
        write_json(self.manifest, {"about": dict(self.about), "content": self.content, "bytes": size, "sha256": digest})
