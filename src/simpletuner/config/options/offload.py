"""Weights and activations that wait elsewhere than on the accelerator."""

from typing import Literal

from simpletuner.config.options.kinds import Count, PathText, Slice


class OffloadOptions(Slice):
    """Offloading."""

    offload_during_startup: bool = False
    """Keep off the accelerator what the current phase does not use."""

    enable_group_offload: bool = False
    """Keep the transformer's frozen blocks in the machine's memory and bring each to the accelerator when its turn
    comes, forwards and backwards. Adapters stay there. The results are the same bits."""

    group_offload_type: Literal["block_level", "leaf_level"] = "block_level"
    """What comes and goes at once: whole blocks, or single layers, which takes less memory and more time."""

    group_offload_blocks_per_group: Count = 1
    """Blocks that come and go together, with `block_level`."""

    group_offload_use_stream: bool = False
    """Copy the next group while this one computes. Takes one group more."""

    group_offload_text_encoder: bool = False
    """The same for the text encoder: it is then streamed layer by layer over all captions (`text_encoder_mode`)."""

    group_offload_vae: bool = False
    """The same for the autoencoder, layer by layer."""

    group_offload_to_disk_path: PathText | None = None
    """A folder from which blocks are read instead of from the machine's memory; they are written there first, where
    the model's own file cannot serve."""

    activation_offload: bool = False
    """Keep the inputs of recomputed blocks in the machine's memory until the backward pass wants them."""
