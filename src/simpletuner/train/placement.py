"""Keep weights on the accelerator, in host memory or on disk between their uses, as the offload options say."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.flux2.autoencoder import Autoencoder
from simpletuner.flux2.components import open_autoencoder
from simpletuner.flux2.generate import Decode
from simpletuner.flux2.residency import resident_indices
from simpletuner.flux2.source import Source
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import offload
from simpletuner.memory.free import release_memory


def stream_blocks(
    transformer: Flux2Transformer, options: OffloadOptions, device: torch.device
) -> offload.Streaming | None:
    """Stream the frozen weights of the transformer's blocks to `device`, and move everything else there, if
    `enable_group_offload` is set. Resident blocks move too and stay plain modules. Call it after adapters are attached
    and before activation checkpointing is installed. An unresolved `group_offload_resident_blocks` auto counts as 0.
    Returns None if streaming is off.

    Raises:
        DiskError: no space in `group_offload_to_disk_path`.
        MemoryBudgetError: the blocks' host memory cannot be pinned.
    """
    if not options.enable_group_offload:
        return None
    resident = resident_indices(transformer.spec, options.resident_blocks or 0)
    streamed = [block for index, block in enumerate(transformer.blocks) if index not in resident]
    if options.group_offload_type == "leaf_level":
        groups = offload.leaf_groups(streamed)
    else:
        groups = offload.block_groups(streamed, options.group_offload_blocks_per_group)
    folder = options.group_offload_to_disk_path
    return offload.install(
        transformer,
        groups,
        device=device,
        ahead=options.prefetches(device.type),
        folder=None if folder is None else Path(folder),
    )


def residency_text(options: OffloadOptions, spec: TransformerSpec) -> str:
    """The number of blocks that stay on the accelerator, as a suffix for the streaming message; empty if there are
    none.
    """
    count = options.resident_blocks or 0
    text = f"; {min(count, spec.blocks)} of {spec.blocks} blocks stay resident" if count else ""
    return f"{text}, fewer than group_offload_resident_blocks = {count}" if count > spec.blocks else text


def open_decoder(
    model: ModelOptions, options: OffloadOptions, source: Source, device: torch.device
) -> Callable[[], Decode]:
    """Return a function that returns the VAE decoder. By default the first call loads it and it stays loaded. With
    `offload_during_startup` each decoding loads it and frees it afterwards.
    """

    @cache
    def loaded() -> Autoencoder:
        return open_autoencoder(model, options, source, device, "decode")

    def decode_and_free(latents: Float[Tensor, "b 128 h w"]) -> Float[Tensor, "b 3 H W"]:
        pixels = open_autoencoder(model, options, source, device, "decode").decode(latents)
        release_memory(device)
        return pixels

    return (lambda: decode_and_free) if options.offload_during_startup else (lambda: loaded().decode)
