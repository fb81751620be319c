"""Weights and activations that wait elsewhere than on the accelerator."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.options.kinds import Count, PathText, Says, Slice, boolean_as_text, whole_as_text

AUTO = "auto"


def _is_auto_or_count(text: str) -> str:
    if text != AUTO and re.fullmatch(r"\d+", text, re.ASCII) is None:
        raise ValueError(text)
    return text


class OffloadOptions(Slice):
    """Offloading."""

    offload_during_startup: bool = False
    """Keep off the accelerator what the current phase does not use."""

    enable_group_offload: bool = False
    """Keep the transformer's frozen blocks in the machine's memory and bring each to the accelerator when its turn
    comes, forwards and backwards. Adapters stay there. The results are the same bits, as far as
    [kernels are deterministic](runs.md#equal-bits)."""

    group_offload_type: Literal["block_level", "leaf_level"] = "block_level"
    """What comes and goes at once: whole blocks, or single layers, which takes less memory and more time."""

    group_offload_blocks_per_group: Count = 1
    """Blocks that come and go together, with `block_level`."""

    group_offload_resident_blocks: Annotated[
        str,
        BeforeValidator(whole_as_text),
        AfterValidator(_is_auto_or_count),
        Says("auto, or a whole number of at least 0", near=(AUTO,)),
    ] = AUTO
    """Blocks that stay on the accelerator all the same; the others are streamed. `auto` keeps as many as the memory
    plan has room for, and none on a CPU or in `simpletuner sample`. [Which ones](offload.md#resident-blocks)."""

    group_offload_use_stream: Annotated[Literal["auto", "true", "false"], BeforeValidator(boolean_as_text)] = "auto"
    """Copy the next group while this one computes. Takes one group more. `auto` does so on a CUDA device, unless the
    plan has room for one group only."""

    group_offload_text_encoder: bool = False
    """The same for the text encoder: it is then streamed layer by layer over all captions (`text_encoder_mode`)."""

    group_offload_vae: bool = False
    """The same for the autoencoder, layer by layer."""

    group_offload_to_disk_path: PathText | None = None
    """A folder from which blocks are read instead of from the machine's memory; they are written there first, where
    the model's own file cannot serve."""

    activation_offload: bool = False
    """Keep the inputs of recomputed blocks in the machine's memory until the backward pass wants them."""

    @property
    def resident_blocks(self) -> int | None:
        """The number of `group_offload_resident_blocks`; None for `auto`."""
        return None if self.group_offload_resident_blocks == AUTO else int(self.group_offload_resident_blocks)

    def copies_ahead(self, device_type: str) -> bool:
        """Whether copies to a device of this type ("cuda", "cpu") run beside the compute, as far as the device alone
        decides."""
        choice = self.group_offload_use_stream
        return device_type == "cuda" if choice == AUTO else choice == "true" and device_type != "cpu"
