"""Where weights are while they are not used: on the accelerator, or off it, as the options of offloading say."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.flux2.autoencoder import Autoencoder
from simpletuner.flux2.components import open_autoencoder
from simpletuner.flux2.generate import Decode
from simpletuner.flux2.source import Source
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import offload
from simpletuner.memory.free import release_memory


def stream_blocks(
    transformer: Flux2Transformer, options: OffloadOptions, device: torch.device
) -> offload.Streaming | None:
    """Stream the frozen weights of the transformer's blocks to `device`, and move all else there, if asked to. Adapters
    are attached by now, and nothing has recomputed blocks yet.

    Raises:
        DiskError: no space in `group_offload_to_disk_path`.
        MemoryBudgetError: the memory for the blocks cannot be locked.
    """
    if not options.enable_group_offload:
        return None
    if options.group_offload_type == "leaf_level":
        groups = offload.leaf_groups(transformer.blocks)
    else:
        groups = offload.block_groups(transformer.blocks, options.group_offload_blocks_per_group)
    folder = options.group_offload_to_disk_path
    return offload.install(
        transformer,
        groups,
        device=device,
        ahead=options.group_offload_use_stream and device.type != "cpu",
        folder=None if folder is None else Path(folder),
    )


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
