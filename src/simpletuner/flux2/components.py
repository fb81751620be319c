"""Load FLUX.2's components as the options configure them: precision, device, resident or streamed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from simpletuner.base.sizes import format_size
from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.precision import PrecisionOptions
from simpletuner.flux2.autoencoder import Autoencoder
from simpletuner.flux2.export import attach_saved, read_lora
from simpletuner.flux2.footprint import resident_text_bytes
from simpletuner.flux2.load import (
    Half,
    checked_skeleton,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    stream_text_encoder,
    text_encoder_id,
)
from simpletuner.flux2.lora import target_ranges
from simpletuner.flux2.residency import block_index, resident_indices
from simpletuner.flux2.source import Source
from simpletuner.flux2.spec import text_from_config
from simpletuner.flux2.text import CODECS, TextCodec, TextEncoder
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.free import free_memory_bytes
from simpletuner.memory.precision import DTYPES, check_precision
from simpletuner.memory.shard import Sharding


def check_precisions(options: PrecisionOptions, device: torch.device) -> None:
    """Raise a ConfigError if `device` does not support a precision in `options`."""
    check_precision(options.base_model_precision, device, "base_model_precision")
    check_precision(options.text_encoder_1_precision, device, "text_encoder_1_precision")


def quantized_on(options: PrecisionOptions, device: torch.device) -> torch.device:
    """The device on which weights for `device` are quantized."""
    return device if options.quantize_via == "accelerator" else torch.device("cpu")


def text_codec(
    model: ModelOptions, precision: PrecisionOptions, source: Source, *, all_bytes: bool = False
) -> TextCodec:
    """The storage format of this text encoder's contexts.

    Its key identifies the encoder's weights and all options that change a context. Without `all_bytes`, only the start
    of each weight is hashed; see `Source.fingerprint`.
    """
    side, dtype = source.flavour.text.padding_side, DTYPES[precision.text_dtype]
    key = text_encoder_id(
        source,
        dtype,
        fix_regex=model.tokenizer_fix_regex,
        precision=precision.text_encoder_1_precision,
        all_bytes=all_bytes,
    )
    rows = 1 if side == "left" else source.text_length
    return CODECS[side](key, rows * source.spec.context_dim * dtype.itemsize)


def check_trainable(model: ModelOptions, lora: LoraOptions, source: Source) -> None:
    """Check that the trainable parameters can be loaded, from file headers and `init_lora`. Reads no base weights.

    Raises:
        AccessError: the transformer's tensors are not those of a FLUX.2.
        ConfigError: the LoRA target matches no layer.
        CheckpointError: `init_lora` cannot be read or does not fit.
    """
    skeleton = checked_skeleton(source)
    if model.model_type == "full":
        return
    if lora.init_lora is None:
        target_ranges(skeleton, lora)
    else:
        attach_saved(skeleton, read_lora(Path(lora.init_lora)))


def load_device(options: OffloadOptions, spec: TransformerSpec, device: torch.device) -> Callable[[str], torch.device]:
    """Return a function that maps a tensor's name to the device to load it to.

    That is the CPU for tensors of streamed blocks, since all blocks together may not fit on the accelerator, and
    `device` for all others.
    """
    resident = resident_indices(spec, options.resident_blocks or 0)

    def device_of(name: str) -> torch.device:
        index = block_index(spec, name)
        is_streamed = options.enable_group_offload and index is not None and index not in resident
        return torch.device("cpu") if is_streamed else device

    return device_of


def open_autoencoder(
    model: ModelOptions, offload: OffloadOptions, source: Source, device: torch.device, half: Half
) -> Autoencoder:
    """Load `half` of the autoencoder, on `device` or streamed to it.

    Raises:
        AccessError: it cannot be loaded.
    """
    return load_autoencoder(
        source,
        DTYPES[model.vae_dtype],
        device,
        tiling=model.vae_enable_tiling,
        slicing=model.vae_enable_slicing,
        is_streamed=offload.group_offload_vae,
        ahead=offload.prefetches(device.type),
        half=half,
    )


def open_text_encoder(
    model: ModelOptions,
    precision: PrecisionOptions,
    offload: OffloadOptions,
    source: Source,
    device: torch.device,
    *,
    folder: Path,
    report: Callable[[str], None],
    processes: int = 1,
) -> TextEncoder:
    """Load the text encoder, resident or streamed. `report` is called with the choice that mode `auto` makes and why.

    Args:
        folder: where a streamed encoder stores hidden states that do not stay in memory.
        processes: number of processes that load a text encoder into the same memory.

    Raises:
        AccessError: it cannot be loaded.
        ConfigError: it has fewer layers than the options use, or the context is too short for the template.
    """
    dtype, precision_name = DTYPES[precision.text_dtype], precision.text_encoder_1_precision
    mode = "streamed" if offload.group_offload_text_encoder else precision.text_encoder_mode
    if mode == "auto":
        tokens = precision.text_encoder_batch_size * source.text_length
        text = text_from_config(source.text_encoder.config or {})
        needed = sum(
            resident_text_bytes(text, source.text_layers, tokens=tokens, precision=precision_name, dtype=dtype)
        )
        free = free_memory_bytes(device) // processes
        mode = "resident" if needed <= free else "streamed"
        per_process = f" for each of {processes} processes" if processes > 1 else ""
        memory = f"{format_size(free)} of memory {'on the GPU ' if device.type == 'cuda' else ''}is free{per_process}"
        choice = (
            "resident: it needs" if mode == "resident" else "streamed, one layer at a time: resident, it would need"
        )
        report(f"The text encoder is {choice} up to {format_size(needed)}; {memory}.")
    load = partial(stream_text_encoder, folder=folder) if mode == "streamed" else load_text_encoder
    return load(
        source,
        dtype,
        device,
        fix_regex=model.tokenizer_fix_regex,
        precision=precision_name,
        quantize_on=quantized_on(precision, device),
    )


def load_base(
    options: PrecisionOptions,
    offload: OffloadOptions,
    source: Source,
    device: torch.device,
    *,
    report: Callable[[str], None],
    sharding: Sharding | None = None,
) -> Flux2Transformer:
    """Load the frozen transformer in the precision of `options`, sharded or on the devices that `offload` selects.

    `report` is called with a sentence if a cached quantized base cannot be used.

    Raises:
        AccessError: it cannot be loaded.
        ConfigError: the precision does not support its shapes.
        DiskError: no space to cache the quantized base.
    """
    folder = options.base_model_cache_dir
    return load_transformer(
        source,
        DTYPES[options.base_dtype],
        device,
        options.base_model_precision,
        device_of=load_device(offload, source.spec, device),
        quantize_on=quantized_on(options, device),
        cache_dir=None if folder is None else Path(folder),
        report=report,
        sharding=sharding,
    )
