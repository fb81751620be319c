"""Cache of a quantized base model on disk, so that the next run need not quantize it again."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.base.files import file_errors_reported, read_json, sha256_file, sha256_json, write_json
from simpletuner.base.parts import locked_part, remove_abandoned_parts
from simpletuner.flux2.source import Source
from simpletuner.memory.precision import library_version
from simpletuner.memory.tensors import save_tensors

_FORMAT = "1"
"""Version of the tensors' names and contents. A new version invalidates every cached base."""


@dataclass(frozen=True)
class QuantizedBaseCache:
    """A file of tensors in `folder`, and a manifest of the same stem with their origin, size and SHA-256.

    The manifest is written last; tensors without a manifest are ignored.
    """

    folder: Path
    origin: Mapping[str, str]
    """Format, source, precision, dtype and library: the manifest's `about`; its hash is part of the file name."""
    content: str
    """Fingerprint of all bytes of the source transformer."""

    @classmethod
    def of(cls, folder: Path, source: Source, precision: str, dtype: torch.dtype) -> "QuantizedBaseCache":
        """The cache of the transformer of `source`, quantized to `precision`, with other weights in `dtype`."""
        origin = {
            "format": _FORMAT,
            "source": source.fingerprint("transformer"),
            "precision": precision,
            "dtype": str(dtype).removeprefix("torch."),
            "library": library_version(precision),
        }
        return cls(folder, origin, source.fingerprint("transformer", all_bytes=True))

    @property
    def weights(self) -> Path:
        """The file of the tensors."""
        return self.folder / f"{self.origin['precision']}-{sha256_json(dict(self.origin))[:16]}.safetensors"

    @property
    def manifest(self) -> Path:
        """The JSON file with their origin, size and SHA-256."""
        return self.weights.with_suffix(".json")

    def verified(self, report: Callable[[str], None]) -> Path | None:
        """The tensor file, if its manifest describes this base and its bytes match; otherwise None.

        Calls `report` with the reason for rejecting an existing cache. Removes partial files of killed processes.
        """
        remove_abandoned_parts(self.folder, ".*.safetensors.*.part")
        if not self.manifest.exists():
            return None
        damage = self._damage()
        if damage is None:
            return self.weights
        report(f"The quantized base in {self.folder} cannot be used; the model is quantized again: {damage}.")
        return None

    def _damage(self) -> str | None:
        """Why the cache cannot be used; None if it can."""
        try:
            manifest = read_json(self.manifest)
            origin, size, digest = manifest["about"], manifest["bytes"], manifest["sha256"]
            # Manifests of earlier releases lack `content`: their `about` identifies the first 4 KiB of each tensor.
            content = manifest.get("content", self.content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return f"{self.manifest.name} cannot be read"
        if origin != self.origin:
            return f"{self.manifest.name} describes another model or precision"
        if content != self.content:
            return f"the transformer's weights are not those that {self.weights.name} was made from"
        if not self.weights.is_file():
            return f"{self.weights.name} is missing"
        if self.weights.stat().st_size != size or sha256_file(self.weights) != digest:
            return f"{self.weights.name} has changed since it was written"
        return None

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Write `tensors`, one at a time, then the manifest.

        Raises:
            DiskError: no space; no partial file remains.
        """
        with file_errors_reported(self.weights):
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked_part(self.weights) as part:
                save_tensors(part, tensors, {})
                size, digest = part.stat().st_size, sha256_file(part)
                os.replace(part, self.weights)
        write_json(
            self.manifest, {"about": dict(self.origin), "content": self.content, "bytes": size, "sha256": digest}
        )
