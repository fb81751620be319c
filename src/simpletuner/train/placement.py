"""Where weights are while they are not used: on the accelerator, or off it, as the options of offloading say."""

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
    """Stream the frozen weights of the transformer's blocks to `device`, and move all else there, if asked to: resident
    blocks too, which stay the plain modules they are. Adapters are attached by now, and nothing has recomputed blocks
    yet. An `auto` that no memory plan has settled is no resident block.

    Raises:
        DiskError: no space in `group_offload_to_disk_path`.
        MemoryBudgetError: the memory for the blocks cannot be locked.
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
        ahead=options.copies_ahead(device.type),
        folder=None if folder is None else Path(folder),
    )


def residency_text(options: OffloadOptions, spec: TransformerSpec) -> str:
    """How many blocks stay on the accelerator, to be appended to what is streamed; empty where none does."""
    count = options.resident_blocks or 0
    told = f"; {min(count, spec.blocks)} of {spec.blocks} blocks stay resident" if count else ""
    return f"{told}, fewer than group_offload_resident_blocks = {count}" if count > spec.blocks else told


def open_decoder(
    model: ModelOptions, options: OffloadOptions, source: Source, device: torch.device
) -> Callable[[], Decode]:
    """What gives the autoencoder's decoder when a picture is due. It stays where it is after the first; with
    `offload_during_startup` it comes for each picture, once its latents are there, and is let go behind it.
    """

    @cache
    def kept() -> Autoencoder:
        return open_autoencoder(model, options, source, device, "decode")

    def once(latents: Float[Tensor, "b 128 h w"]) -> Float[Tensor, "b 3 H W"]:
        pixels = open_autoencoder(model, options, source, device, "decode").decode(latents)
        release_memory(device)
        return pixels

    return (lambda: once) if options.offload_during_startup else (lambda: kept().decode)
