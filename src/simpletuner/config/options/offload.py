"""Options for offloading weights and activations from the accelerator."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.options.kinds import Count, Expects, PathText, Slice, boolean_as_text, whole_as_text

AUTO = "auto"


def _is_auto_or_count(text: str) -> str:
    if text != AUTO and re.fullmatch(r"\d+", text, re.ASCII) is None:
        raise ValueError(text)
    return text


class OffloadOptions(Slice):
    """Offloading."""

    offload_during_startup: bool = False
    """Keep on the accelerator only the models that the current phase uses."""

    enable_group_offload: bool = False
    """Keep the transformer's frozen blocks in host memory (RAM) and copy each to the accelerator when the forward or
    backward pass needs it. Adapters stay on the accelerator. Results are bit-identical, as far as
    [kernels are deterministic](runs.md#equal-bits)."""

    group_offload_type: Literal["block_level", "leaf_level"] = "block_level"
    """Unit of offloading: whole blocks (`block_level`) or single layers (`leaf_level`), which take less memory and more
    time."""

    group_offload_blocks_per_group: Count = 1
    """Number of blocks to copy together, with `block_level`."""

    group_offload_resident_blocks: Annotated[
        str,
        BeforeValidator(whole_as_text),
        AfterValidator(_is_auto_or_count),
        Expects("auto, or a whole number of at least 0", near=(AUTO,)),
    ] = AUTO
    """Number of blocks that stay on the accelerator; the others are offloaded. `auto` keeps as many as fit by the
    memory plan, and none on a CPU or in `simpletuner sample`. [Which blocks stay](offload.md#resident-blocks)."""

    group_offload_use_stream: Annotated[Literal["auto", "true", "false"], BeforeValidator(boolean_as_text)] = "auto"
    """Prefetch the next group on a copy stream while the current one computes. Takes memory for one more group. `auto`
    prefetches on a CUDA device, unless only one group fits by the memory plan."""

    group_offload_text_encoder: bool = False
    """Offload the text encoder: load one layer at a time and run all captions through it, as with `text_encoder_mode`
    `streamed`."""

    group_offload_vae: bool = False
    """Offload the VAE layer by layer."""

    group_offload_to_disk_path: PathText | None = None
    """Folder on disk to offload blocks to, instead of host memory. Blocks are first written there, except where they
    can be read from the model's own file."""

    activation_offload: bool = False
    """Keep the inputs of checkpointed blocks in host memory until the backward pass needs them."""

    @property
    def resident_blocks(self) -> int | None:
        """`group_offload_resident_blocks` as a number; None for `auto`."""
        return None if self.group_offload_resident_blocks == AUTO else int(self.group_offload_resident_blocks)

    def prefetches(self, device_type: str) -> bool:
        """Whether groups are prefetched to a device of this type ("cuda", "cpu"), before the memory plan is considered
        (see `group_offload_use_stream`)."""
        choice = self.group_offload_use_stream
        return device_type == "cuda" if choice == AUTO else choice == "true" and device_type != "cpu"
