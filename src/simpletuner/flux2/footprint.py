"""Memory that each phase of a run needs, in bytes, computed from module shapes and options. Reads no weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import nn

from simpletuner.base.errors import AccessError, ConfigError
from simpletuner.base.files import file_errors_reported, with_home
from simpletuner.config.deepspeed import ZeroSettings
from simpletuner.config.flavours import FLAVOURS, AutoencoderSpec, TextSpec, TransformerSpec
from simpletuner.config.optimizers import known_optimizer
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.offload import AUTO
from simpletuner.config.precisions import NO_CHANGE, PRECISIONS
from simpletuner.config.previews import validation_scales
from simpletuner.config.run import RunConfig
from simpletuner.flux2.activations import Adapted, TransformerPass, sampling, training
from simpletuner.flux2.configs import Component, Config, read_component_config
from simpletuner.flux2.lora import target_ranges
from simpletuner.flux2.names import transformer_renaming
from simpletuner.flux2.residency import resident_indices
from simpletuner.flux2.routes import resolve
from simpletuner.flux2.single import autoencoder_spec_in, single_files, text_spec_in
from simpletuner.flux2.source import Weights, transformer_spec
from simpletuner.flux2.spec import (
    autoencoder_from_config,
    decoder_shapes,
    encoder_shapes,
    text_from_config,
)
from simpletuner.flux2.stored import native_precisions, stored_weights
from simpletuner.flux2.text_stream import MEMORY_BYTES, PORTION_TOKENS
from simpletuner.flux2.tokens import PIXELS_PER_TOKEN
from simpletuner.flux2.transformer import empty_transformer
from simpletuner.memory.planner import (
    Engine,
    MachineMemory,
    MemoryPart,
    MemoryPlan,
    MemoryTier,
    PhasePlan,
    PlannedPhase,
    plannable_bytes,
)
from simpletuner.memory.precision import DTYPES, stored_bytes
from simpletuner.memory.wire import Wire, all_reduce_bytes, shard_exchange_bytes
from simpletuner.memory.world import BUCKET_BYTES

# Architecture and workload


@dataclass(frozen=True)
class Architecture:
    """The shapes of a FLUX.2 model, and the formats of its transformer's file."""

    transformer: TransformerSpec
    text: TextSpec
    autoencoder: AutoencoderSpec
    text_layers: tuple[int, ...]
    text_length: int
    """Tokens of a context, padding included."""
    has_whole_contexts: bool
    """Whether padding rows of a context are computed and cached too: true for flavours that pad on the right."""
    native_precisions: tuple[tuple[str, str], ...] = ()
    """Linears of blocks that the transformer's file holds in one of `PRECISIONS`, and that precision."""
    is_decoded: bool = False
    """Whether that file is quantized: its weights are decoded, so none is a view of the memory-mapped file."""

    @classmethod
    def of(cls, config: RunConfig) -> "Architecture":
        """Read the architecture from local files. Components that are not local are assumed to be the flavour's own.

        Downloads and creates nothing.

        Raises:
            AccessError: a local file is not of a FLUX.2 model.
        """
        flavour = FLAVOURS[config.model_flavour]
        transformer, text, autoencoder = flavour.transformer, flavour.text.encoder, flavour.autoencoder
        precisions: tuple[tuple[str, str], ...] = ()
        is_decoded = False
        single = single_files(config)
        if file := single.get("transformer"):
            transformer = transformer_spec(Weights((file,), None), file.name)
            stored = stored_weights((file,))
            is_decoded = not all(weight.is_plain for weight in stored.values())
            precisions = tuple(native_precisions(stored, transformer_renaming(stored)).items())
        elif local_config := _local(config, "transformer", config.pretrained_transformer_model_name_or_path):
            transformer = transformer_spec(Weights((), local_config), "transformer")
        try:
            if file := single.get("text_encoder"):
                text = text_spec_in(file, text)
            elif local_config := _local(config, "text_encoder", config.pretrained_text_encoder_model_name_or_path):
                text = text_from_config(local_config)
            if file := single.get("vae"):
                autoencoder = autoencoder_spec_in(file, autoencoder)
            elif local_config := _local(config, "vae", config.pretrained_vae_model_name_or_path):
                autoencoder = autoencoder_from_config(local_config)
        except KeyError as error:
            finding = f"a text encoder's config.json has no {error}"
            raise AccessError.of(finding, f"that of {flavour.title}'s text encoder") from None
        return cls(
            transformer,
            text,
            autoencoder,
            config.custom_text_encoder_intermediary_layers or flavour.text.layers,
            config.tokenizer_max_length or flavour.text.length,
            flavour.text.padding_side == "right",
            precisions,
            is_decoded,
        )


def _local(config: RunConfig, component: Component, override: str | None) -> Config | None:
    """The config of a component in a local folder; None if there is none."""
    base = config.pretrained_model_name_or_path
    folders = [Path(with_home(override)) / component, Path(with_home(override))] if override else []
    folders += [Path(with_home(base)) / component] if base and not override else []
    for folder in folders:
        with file_errors_reported(folder, AccessError, doing="read"):
            if (folder / "config.json").is_file():
                return read_component_config(component, folder / "config.json")
    return None


@dataclass(frozen=True)
class Workload:
    """Sizes and counts of the images and captions of a run. None means that the dataset has not been scanned."""

    bucket: tuple[int, int]
    """(width, height) in pixels of the largest training images."""
    batch: int
    """Images in one forward pass."""
    references: int = 0
    """Maximum number of reference tokens in a sample of that size."""
    strict_references: int = 0
    """Tokens among `references` whose reference image has the size of the training image."""
    largest_encoded_size: tuple[int, int] | None = None
    """(width, height) of the largest image that the VAE encodes; None for `bucket`."""
    prompt_reference_tokens: int = 0
    """Maximum number of reference tokens of a validation image."""
    forced_share: float = 0.0
    """Largest share of an image's tokens that TREAD must keep because of a mask; 0 without a scan."""
    images: int | None = None
    """Images of all datasets: training and held-out images, without references."""
    cached_images: int | None = None
    """Number of latents to cache, references included."""
    captions: int | None = None
    """Number of contexts to cache."""
    caption_tokens: int | None = None
    """Tokens of the longest caption, template included; None for the length of a context."""
    tokenizer: Path | None = None
    """Folder of the tokenizer that counted them; None if they are estimated."""
    samples_images: bool = True
    """Whether the run generates validation images."""
    steps: int | None = None
    """Optimizer steps of the run; None if they depend on a dataset that has not been scanned."""
    train_images: int | None = None
    """Training images, held-out ones left out."""
    visits_per_image: float | None = None
    """How often the run trains on each training image, on average."""

    @property
    def largest_encoded(self) -> tuple[int, int]:
        """(width, height) of the largest image that the VAE encodes."""
        return self.largest_encoded_size or self.bucket


def tokens_of(size: tuple[int, int]) -> int:
    """Tokens of an image of (width, height) pixels."""
    return (size[0] // PIXELS_PER_TOKEN) * (size[1] // PIXELS_PER_TOKEN)


# Weights


def _stored(shape: tuple[int, int], precision: str, dtype: torch.dtype) -> int:
    """Bytes of a matrix in `precision`, or in `dtype` if that is `NO_CHANGE`."""
    try:
        return stored_bytes(shape, precision, dtype.itemsize)
    except ValueError as error:
        raise ConfigError.of(
            f"{precision} cannot hold this model: {error}", remedy="int8-quanto supports every shape."
        ) from None


@dataclass(frozen=True)
class TransformerBytes:
    """Bytes of a transformer's weights in their precisions."""

    blocks: tuple[int, ...]
    """Of each block, double blocks first."""
    outside_blocks: int
    """Of embedders, modulation and output layers."""
    largest_layers: tuple[int, ...]
    """Of the largest layer in each block."""
    largest_matrix: int
    """Number of elements of the largest matrix in a block."""
    shards: int
    """Of one process's shards if all weights are sharded by rows. The last shard is padded to full size."""

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.outside_blocks


@lru_cache(maxsize=64)
def transformer_bytes(
    spec: TransformerSpec,
    precision: str,
    dtype: torch.dtype,
    ranks: int = 1,
    precisions: tuple[tuple[str, str], ...] = (),
) -> TransformerBytes:
    """Bytes of a transformer with its blocks' matrices in `precision` and everything else in `dtype`.

    Args:
        ranks: number of processes that shard the weights.
        precisions: Linears of blocks with another precision, and that precision.

    Raises:
        ConfigError: the precision does not support one of their shapes.
    """
    transformer = empty_transformer(spec)
    exceptions = dict(precisions)
    precision_of = {
        id(weight): exceptions.get(name.removesuffix(".weight"), precision)
        for name, weight in transformer.named_parameters()
    }

    def size_of(parameter: nn.Parameter) -> int:
        if parameter.ndim != 2:
            return parameter.numel() * dtype.itemsize
        rows, columns = parameter.shape
        return _stored((rows, columns), precision_of[id(parameter)], dtype)

    def shard(parameter: nn.Parameter, size: int) -> int:
        rows = parameter.shape[0]
        return math.ceil(size / rows * math.ceil(rows / ranks))

    blocks = [[*block.parameters()] for block in transformer.blocks]
    matrices = [parameter for block in blocks for parameter in block if parameter.ndim == 2]
    in_blocks = {id(parameter) for block in blocks for parameter in block}
    outside = [parameter for parameter in transformer.parameters() if id(parameter) not in in_blocks]
    return TransformerBytes(
        blocks=tuple(sum(map(size_of, block)) for block in blocks),
        outside_blocks=sum(p.numel() * dtype.itemsize for p in outside),
        largest_layers=tuple(max(map(size_of, block)) for block in blocks),
        largest_matrix=max(parameter.numel() for parameter in matrices),
        shards=sum(shard(parameter, size_of(parameter)) for block in blocks for parameter in block)
        + sum(shard(parameter, parameter.numel() * dtype.itemsize) for parameter in outside),
    )


def adapted_blocks(spec: TransformerSpec, options: LoraOptions) -> tuple[Adapted, ...]:
    """Adapted Linears of each block, double blocks first. For `init_lora` the options' target is assumed.

    Raises:
        ConfigError: the target matches no Linear.
    """
    return _adapted(spec, options.flux_lora_target, options.peft_lora_target_modules)


@lru_cache(maxsize=16)
def _adapted(spec: TransformerSpec, target: str, modules: str | tuple[str, ...] | None) -> tuple[Adapted, ...]:
    options = LoraOptions.model_validate({"flux_lora_target": target, "peft_lora_target_modules": modules})
    ranges = target_ranges(empty_transformer(spec), options)
    names = [f"transformer_blocks.{index}." for index in range(spec.double_blocks)]
    names += [f"single_transformer_blocks.{index}." for index in range(spec.single_blocks)]
    return tuple(
        tuple((name.removeprefix(block), adapted) for name, adapted in ranges.items() if name.startswith(block))
        for block in names
    )


@lru_cache(maxsize=64)
def _adapter_parameters(blocks: tuple[Adapted, ...], rank: int) -> int:
    """Number of parameters of the adapters."""
    sides = (side for block in blocks for _, adapted in block for side in (adapted.rows, adapted.columns))
    return rank * sum(stop - start for start, stop in sides)


@lru_cache(maxsize=64)
def _saved_parameters(spec: TransformerSpec, blocks: tuple[Adapted, ...], rank: int) -> int:
    """Number of parameters of the exported LoRA, whose adapters are expanded to whole Linears."""
    modules = empty_transformer(spec).blocks
    linears = (block.get_submodule(name) for block, adapted in zip(modules, blocks, strict=True) for name, _ in adapted)
    return rank * sum(each.in_features + each.out_features for each in linears if isinstance(each, nn.Linear))


def recomputed_blocks(config: RunConfig, blocks: int) -> tuple[bool, ...]:
    """Whether each block is recomputed in the backward pass."""
    every = config.gradient_checkpointing_interval
    return tuple(
        config.gradient_checkpointing and (every is None or (index + 1) % every != 0) for index in range(blocks)
    )


def text_bytes(text: TextSpec, precision: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a text encoder's embedding, and of one layer."""
    layer = sum(_stored(shape, precision, dtype) for shape in text.linears)
    return text.vocabulary * text.hidden * dtype.itemsize, layer + text.scales * dtype.itemsize


def text_activation_bytes(text: TextSpec, tokens: int, states: int, dtype: torch.dtype) -> int:
    """Peak activation bytes of a batch of `tokens`, reached in a feed-forward: gate, value and their product, plus the
    residual stream, its norm, and `states` hidden states kept for the context.
    """
    return tokens * (3 * text.inner + (2 + states) * text.hidden) * dtype.itemsize


def resident_text_bytes(
    text: TextSpec, layers: Sequence[int], *, tokens: int, precision: str, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes of a text encoder loaded up to the last of `layers`: weights, and peak memory in addition to them.

    That peak is the activations of `tokens` tokens or, if larger, the plain weight of the largest Linear, which is in
    memory while it is quantized.
    """
    embedding, layer = text_bytes(text, precision, dtype)
    plain = 0 if precision == NO_CHANGE else max(map(math.prod, text.linears)) * dtype.itemsize
    activations = text_activation_bytes(text, tokens, len(layers) - 1, dtype)
    return embedding + max(layers) * layer, max(activations, plain)


def autoencoder_bytes(half: Sequence[Sequence[int]], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of all weights of one half of the autoencoder, and of its largest layer."""
    sizes = [math.prod(shape) * dtype.itemsize for shape in half]
    return sum(sizes), max(sizes)


def encoding_bytes(autoencoder: AutoencoderSpec, pixels: int, dtype: torch.dtype) -> int:
    """Peak activation bytes of encoding an image: five times the first level's output, while it is downsampled."""
    return 5 * autoencoder.channels[0] * pixels * dtype.itemsize


def decoding_bytes(autoencoder: AutoencoderSpec, pixels: int, dtype: torch.dtype) -> int:
    """Peak activation bytes of decoding an image: three times the second level's output, after it is upsampled."""
    return 3 * autoencoder.channels[1] * pixels * dtype.itemsize


def checkpoint_bytes(config: RunConfig, exported: int, resume_copy: int, state: int) -> int:
    """Size of a checkpoint: exported weights and a full-precision copy, both twice with EMA, and optimizer `state`."""
    return (exported + resume_copy) * (2 if config.use_ema else 1) + state


# Phases

GATHERED_BLOCKS = 2
"""Sharded blocks that are gathered on a device at a time: the running one and the next one."""

ZERO_ENGINES: tuple[Engine, ...] = ("zero1", "zero2", "zero3")
"""ZeRO engines in the order of their stages."""

STEP_BYTES: dict[MemoryTier, int] = {"accelerator": 44 * 2**22, "ram": 44 * 2**16}
"""Temporary memory of an optimizer step on bf16 weights, which runs in chunks (`train.adamw_bf16`)."""


class _PhaseMemory:
    """Collect the memory parts of a phase for one of a machine's `ranks` processes.

    Without an accelerator, `device` means RAM.
    """

    def __init__(self, machine: MachineMemory, ranks: int) -> None:
        self._device: MemoryTier = "ram" if machine.accelerator is None else "accelerator"
        self._ranks = ranks
        self.sizes: dict[tuple[str, MemoryTier], int] = {}

    def device(self, name: str, size: int) -> None:
        self.add(name, self._device, size)

    def ram(self, name: str, size: int) -> None:
        self.add(name, "ram", size)

    def disk(self, name: str, size: int) -> None:
        self.add(name, "disk", size)

    def add(self, name: str, tier: MemoryTier, size: int) -> None:
        if size:
            self.sizes[name, tier] = self.sizes.get((name, tier), 0) + size

    def plan(self, phase: PlannedPhase, description: str, read: int) -> PhasePlan:
        """The plan of the phase, which reads `read` bytes from the disk."""
        # Each process has its own accelerator; all use the machine's RAM; files on disk are counted once.
        processes = {"accelerator": 1, "ram": self._ranks, "disk": 1}
        parts = (MemoryPart(name, tier, processes[tier] * size) for (name, tier), size in self.sizes.items())
        return PhasePlan(phase, description, tuple(parts), read)


@dataclass(frozen=True)
class StreamedBlocks:
    """Bytes of a transformer's blocks, some of them resident, the others streamed."""

    resident: int
    slots: int
    """Of all slots."""
    streamed: int
    """Of the packed copies of streamed blocks."""
    read_buffers: int
    """Of the buffers for groups read from disk."""

    @property
    def on_device(self) -> int:
        return self.resident + self.slots


@dataclass(frozen=True)
class Footprint:
    """Memory of each phase of a run with `config`."""

    config: RunConfig
    architecture: Architecture
    workload: Workload
    machine: MachineMemory

    def plan(self) -> MemoryPlan:
        """All phases, in the order of the run."""
        phases = [self.text(), self.latents(), self.train()]
        if self.workload.samples_images:
            validation = self.preview if self.has_preview else self.validation
            phases.append(max((validation(size) for size in self.config.sizes), key=_peak_bytes))
        config = self.config
        return MemoryPlan(self.machine, tuple(phases), config.ranks, self.engine, self.wire, config.num_machines)

    # Several processes

    @property
    def engine(self) -> Engine:
        """How the processes train together."""
        if self.config.ranks == 1:
            return "single"
        if self.config.zero_stage:
            return ZERO_ENGINES[self.config.zero_stage - 1]
        return "fsdp2" if self.config.fsdp_enable else "ddp"

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed runs the training."""
        return self.engine in ZERO_ENGINES

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only its share of the transformer's blocks."""
        return self.engine in ("fsdp2", "zero3")

    @property
    def shards_trainable(self) -> bool:
        """Whether each process holds only its share of the trainable parameters. FSDP2 does not shard a LoRA."""
        return self.engine == "zero3" or (self.is_full and self.is_sharded)

    @property
    def shards_gradients(self) -> bool:
        """Whether each process keeps only its share of the gradients."""
        return self.engine == "zero2" or self.shards_trainable

    def _share(self, size: int, *, is_sharded: bool) -> int:
        """Bytes that one process holds of `size` bytes: its shard if `is_sharded`, else all."""
        return math.ceil(size / self.config.ranks) if is_sharded else size

    @cached_property
    def _zero(self) -> ZeroSettings:
        """DeepSpeed's ZeRO settings."""
        return ZeroSettings.model_validate(self.config.zero_optimization)

    @property
    def wire(self) -> Wire | None:
        """Bytes that a process sends in an optimizer step, or None for a single process.

        Scheduled sampling, preservation, held-out loss and validation images are not counted.

        DDP all-reduces the gradients once a step. FSDP2 all-gathers sharded weights in each forward pass, and resharded
        blocks again in each backward pass. It all-reduces a LoRA's gradients once a step, and reduce-scatters those of
        sharded weights in fp32 in each backward pass.

        ZeRO-1 all-reduces the gradients once a step, ZeRO-2 in each backward pass; both then all-gather the new
        weights. (The all-reduce is `use_multi_rank_bucket_allreduce`, on by default; a reduce-scatter would send half.)
        ZeRO-3 all-gathers all weights, frozen and trainable, in each forward and backward pass, except that the
        backward pass needs only the blocks of a frozen base. It reduce-scatters gradients in each backward pass.
        """
        config, weights, ranks = self.config, self._weights, self.config.ranks
        passes, regathers = config.gradient_accumulation_steps, int(config.fsdp_reshard_after_forward)
        reduced = all_reduce_bytes(self._gradient_bytes, ranks)
        gathered = 0
        if self.engine == "single":
            return None
        if self.engine in ("zero1", "zero2"):
            gathered = shard_exchange_bytes(self._gradient_bytes, ranks)
            reduced *= passes if self.shards_gradients else 1
        elif self.engine == "zero3":
            forward = weights.total + (0 if self.is_full else self.trainable_bytes)
            backward = forward - (0 if self.is_full else weights.outside_blocks)
            gathered = passes * shard_exchange_bytes(forward + backward, ranks)
            reduced = passes * shard_exchange_bytes(self._gradient_bytes, ranks)
        elif self.engine == "fsdp2":
            # Weights outside the blocks stay gathered from the forward pass to the end of the backward pass.
            gathered = passes * shard_exchange_bytes(weights.total + regathers * sum(weights.blocks), ranks)
            if self.is_full:
                reduced = passes * shard_exchange_bytes(4 * self.trainable_parameters, ranks)
        return Wire(gathered, reduced, config.num_machines)

    @property
    def _gradient_bytes(self) -> int:
        """Bytes of all gradients as they are reduced and stored: fp32 for masters, the computed dtype for ZeRO."""
        return self._computed_bytes if self.is_zero else self.trainable_bytes

    @property
    def _computed_bytes(self) -> int:
        """Bytes of all gradients as the backward pass computes them."""
        return self.trainable_parameters * (self.dtype.itemsize if self.is_full else 4)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of base weights and activations."""
        return DTYPES[self.config.base_dtype]

    @property
    def vae_dtype(self) -> torch.dtype:
        """The dtype of the VAE."""
        return DTYPES[self.config.vae_dtype]

    @property
    def context_bytes(self) -> int:
        """Bytes of one cached context: all rows, or the rows of its text and one padding row."""
        return (self._text_tokens + (0 if self.architecture.has_whole_contexts else 1)) * self._context_row

    @property
    def _text_tokens(self) -> int:
        """Tokens that the text encoder processes for the longest caption."""
        length = self.architecture.text_length
        if self.architecture.has_whole_contexts or self.workload.caption_tokens is None:
            return length
        return min(self.workload.caption_tokens, length)

    @property
    def latent_bytes(self) -> int:
        """Bytes of one cached latent at the largest image size, fp32."""
        return tokens_of(self.workload.largest_encoded) * self.architecture.transformer.in_channels * 4

    @property
    def _context_row(self) -> int:
        """Bytes of one row of a context."""
        return self.architecture.transformer.context_dim * self.dtype.itemsize

    # Text

    @property
    def text_mode(self) -> str:
        """`resident` or `streamed`. `auto` depends on free host memory, as in the run."""
        config, mode = self.config, self.config.text_encoder_mode
        if config.group_offload_text_encoder:
            return "streamed"
        if mode != "auto":
            return mode
        available = self.machine.ram if self.machine.accelerator is None else self.machine.accelerator
        return "resident" if self._text("resident").total(self._device) <= available else "streamed"

    @property
    def _device(self) -> MemoryTier:
        """The tier of the compute device."""
        return "ram" if self.machine.accelerator is None else "accelerator"

    def text(self) -> PhasePlan:
        """The phase that encodes captions to contexts."""
        return self._text(self.text_mode)

    def _text(self, mode: str) -> PhasePlan:
        """Like `text`, with the text encoder in `mode`."""
        config, text = self.config, self.architecture.text
        layers = self.architecture.text_layers
        depth, state_count = max(layers), len(layers)
        length = self._text_tokens
        captions = math.ceil((self.workload.captions or 0) / config.ranks_per_machine)  # as if machines shared no cache
        per_batch = min(config.text_encoder_batch_size, captions or config.text_encoder_batch_size)
        batch = per_batch * length
        precision = config.text_encoder_1_precision
        memory = _PhaseMemory(self.machine, self.config.ranks_per_machine)
        if mode == "resident":
            weights, extra = resident_text_bytes(text, layers, tokens=batch, precision=precision, dtype=self.dtype)
            memory.device("weights", weights)
            memory.device("activations", extra)
            read = weights
        else:
            _, layer = text_bytes(text, precision, self.dtype)
            memory.device("weights", layer)
            memory.device("activations", text_activation_bytes(text, batch, 0, self.dtype))
            tokens = max(captions, per_batch) * length
            portion = min(tokens, max(PORTION_TOKENS, batch))
            states = portion * text.hidden * state_count * self.dtype.itemsize
            memory.ram("states", min(states, MEMORY_BYTES))
            memory.disk("states", max(0, states - MEMORY_BYTES))
            read = depth * layer * math.ceil(tokens / portion)
        # A batch of contexts is stacked, then split; several files are written at a time.
        unwritten = min(config.write_batch_size + per_batch, max(captions, per_batch))
        memory.ram("contexts", unwritten * length * self._context_row + batch * self._context_row)
        memory.disk("cache", (self.workload.captions or 0) * self.context_bytes)
        return memory.plan("text", f"{mode}, {per_batch} × {length} tokens", read)

    # Latents

    def latents(self) -> PhasePlan:
        """The phase that encodes images to latents."""
        config, autoencoder = self.config, self.architecture.autoencoder
        width, height = self.workload.largest_encoded
        images = math.ceil((self.workload.cached_images or 0) / config.ranks_per_machine)
        batch = min(config.vae_batch_size, images or config.vae_batch_size)
        memory = _PhaseMemory(self.machine, self.config.ranks_per_machine)
        read = self._add_autoencoder(memory, encoder_shapes(autoencoder))
        pixels = self._processed_pixels((width, height), batch)
        memory.device("activations", encoding_bytes(autoencoder, pixels, self.vae_dtype))
        # Pixels of a batch in fp32 and in the VAE's dtype; pixels of prefetched images in uint8.
        memory.device("images", batch * width * height * 3 * (4 + self.vae_dtype.itemsize))
        memory.ram("images", (batch + 2 * config.workers) * width * height * 3)
        memory.disk("cache", (self.workload.cached_images or 0) * self.latent_bytes)
        return memory.plan("latents", f"{width}x{height} × {batch}", read)

    def _add_autoencoder(self, memory: _PhaseMemory, half: Sequence[Sequence[int]]) -> int:
        """Add one half of the autoencoder. Returns the bytes that are read from disk."""
        weights, largest = autoencoder_bytes(half, self.vae_dtype)
        if self.config.group_offload_vae:
            slots = 2 if self._device == "accelerator" and self.config.prefetches("cuda") else 1
            memory.device("VAE weights", slots * largest)
            memory.ram("VAE weights", weights)
        else:
            memory.device("VAE weights", weights)
        return weights

    def _processed_pixels(self, size: tuple[int, int], batch: int) -> int:
        """Pixels that the autoencoder processes at a time."""
        config, tile = self.config, self.architecture.autoencoder.tile
        width, height = (min(side, tile) for side in size) if config.vae_enable_tiling else size
        return width * height * (1 if config.vae_enable_slicing else batch)

    # Training

    @property
    def streams_blocks(self) -> bool:
        """Whether the transformer's blocks are streamed from host memory or disk."""
        return self.config.enable_group_offload and not self.is_full

    @cached_property
    def resolved_config(self) -> RunConfig:
        """`config` with each `auto` of the group offload resolved: the number of resident blocks, and the copy stream.

        Keeps as many blocks resident as fit into `plannable_bytes` in training and validation. Uses two slots if both
        fit. Without an accelerator, `auto` means no resident blocks and one slot.
        """
        config, capacity = self.config, self.machine.accelerator
        count, stream = config.resident_blocks, config.group_offload_use_stream
        if not self.streams_blocks or (count is not None and stream != AUTO):
            return config
        if capacity is None:
            return _resolved(config, count or 0, ahead=False)
        other_bytes, ahead = self._bytes_beside_blocks, stream == "true"
        if stream == AUTO:
            ahead = other_bytes + self.streamed_blocks(count or 0, ahead=True).on_device <= capacity
        if count is None:
            count = self.architecture.transformer.blocks
            while count and other_bytes + self.streamed_blocks(count, ahead=ahead).on_device > plannable_bytes(
                capacity
            ):
                count -= 1
        return _resolved(config, count, ahead=ahead)

    @property
    def _bytes_beside_blocks(self) -> int:
        """Peak accelerator bytes of training and validation without the blocks and their slots."""
        bare = replace(self, config=_resolved(self.config, 0, ahead=False))
        phases = [
            bare.train(),
            *(bare._validation(size, 1) for size in self.config.sizes if self.workload.samples_images),
        ]
        peak = max(phase.total("accelerator") for phase in phases) - bare.streamed_blocks(0, ahead=False).on_device
        # A streamed preview model has its own slots, while those of the base stay allocated.
        return peak + (
            self.streamed_blocks(0, ahead=True).slots if self.has_preview and self.workload.samples_images else 0
        )

    def streamed_blocks(self, resident: int, *, ahead: bool) -> StreamedBlocks:
        """Bytes of the blocks with `resident` of them on the accelerator.

        The others are streamed through one slot, or two if the next group is prefetched (`ahead`).
        """
        weights, config = self._weights, self.config
        resident_set = resident_indices(self.architecture.transformer, resident)
        streamed_indices = [index for index in range(len(weights.blocks)) if index not in resident_set]
        if config.group_offload_type == "leaf_level":
            largest = max((weights.largest_layers[index] for index in streamed_indices), default=0)
            groups = 2 * len(streamed_indices)  # at least two leaves for each block
        else:
            sizes = [weights.blocks[index] for index in streamed_indices]
            per_group = config.group_offload_blocks_per_group
            group_sizes = [sum(sizes[start : start + per_group]) for start in range(0, len(sizes), per_group)]
            largest, groups = max(group_sizes, default=0), len(group_sizes)
        streamed = sum(weights.blocks[index] for index in streamed_indices)
        return StreamedBlocks(
            resident=sum(weights.blocks) - streamed,
            slots=min(1 + ahead, groups) * largest,
            streamed=streamed,
            read_buffers=0 if config.group_offload_to_disk_path is None else min(2, groups) * largest,
        )

    @property
    def _streaming(self) -> StreamedBlocks:
        """`streamed_blocks` with the resolved options."""
        config = self.resolved_config
        ahead = config.prefetches("cpu" if self.machine.accelerator is None else "cuda")
        return self.streamed_blocks(config.resident_blocks or 0, ahead=ahead)

    @property
    def _residency_text(self) -> str:
        """The number of resident blocks for the phase's description; empty if no block is streamed."""
        count, blocks = self.resolved_config.resident_blocks or 0, self.architecture.transformer.blocks
        if not self.streams_blocks or (self.machine.accelerator is None and not count):
            return ""
        return f", {min(count, blocks)} of {blocks} blocks resident"

    @property
    def _adapted(self) -> tuple[Adapted, ...]:
        """Adapted Linears of each block."""
        return adapted_blocks(self.architecture.transformer, self.config)

    @property
    def is_full(self) -> bool:
        """Whether all weights are trainable."""
        return self.config.model_type == "full"

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer updates fp32 masters. DeepSpeed makes them even for a LoRA and for fp32 weights."""
        return self.config.has_masters or self.is_zero

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters."""
        return self._parameter_count if self.is_full else _adapter_parameters(self._adapted, self.config.lora_rank)

    @property
    def _parameter_count(self) -> int:
        """Number of parameters of the transformer."""
        return transformer_bytes(self.architecture.transformer, NO_CHANGE, torch.bfloat16).total // 2

    @property
    def trainable_bytes(self) -> int:
        """Bytes of the trainable parameters; adapters and masters are fp32."""
        return self.trainable_parameters * (self.dtype.itemsize if self.is_full and not self.has_masters else 4)

    @property
    def optimizer_bytes(self) -> int:
        """Approximate size of the optimizer state."""
        optimizer = known_optimizer(self.config.optimizer)
        if self.is_full:
            return optimizer.state_size(
                weight.shape for weight in empty_transformer(self.architecture.transformer).parameters()
            )
        return round(self.trainable_parameters * optimizer.state_bytes)

    @property
    def _exported_model_bytes(self) -> int:
        """Size of the transformer that a full run exports."""
        name = self.config.model_save_dtype
        return self.trainable_parameters * (
            self.trainable_bytes // self.trainable_parameters if name is None else DTYPES[name].itemsize
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Approximate size of one checkpoint."""
        config = self.config
        if self.is_full:
            exported = self._exported_model_bytes
            resume_copy = 0 if exported >= self.trainable_bytes else self.trainable_bytes
            return checkpoint_bytes(config, exported, resume_copy, self.optimizer_bytes)
        spec = self.architecture.transformer
        exported = _saved_parameters(spec, self._adapted, config.lora_rank) * DTYPES[config.lora_save_dtype].itemsize
        return checkpoint_bytes(config, exported, self.trainable_bytes, self.optimizer_bytes)

    def transformer_pass(self, size: tuple[int, int], batch: int, references: int = 0) -> TransformerPass:
        """A pass of `batch` images of `size`, each with `references` reference tokens, configured as for training."""
        config, spec = self.config, self.architecture.transformer
        forced = self.workload.forced_share
        routes = [
            replace(route, keep_ratio=max(route.keep_ratio, forced))
            for route in resolve(config.tread_routes, spec.blocks)
        ]
        return TransformerPass(
            spec=spec,
            dtype=self.dtype,
            batch=batch,
            text_tokens=self.architecture.text_length,
            image_tokens=tokens_of(size),
            is_autocast=config.is_autocast,
            is_full=self.is_full,
            is_released=config.optimizer_release_gradients,
            adapted=() if self.is_full else self._adapted,
            rank=config.lora_rank,
            dropout=config.lora_dropout,
            recomputed=recomputed_blocks(config, spec.blocks),
            routes=tuple(routes),
            reference_tokens=references,
            reference_attention=config.reference_attention,
        )

    def train(self) -> PhasePlan:
        """Training steps at the largest bucket."""
        config = self.config
        memory = _PhaseMemory(self.machine, self.config.ranks_per_machine)
        read = self._add_state(memory)
        pass_ = self.transformer_pass(self.workload.bucket, self.workload.batch, self.workload.references)
        accumulated = config.gradient_accumulation_steps > 1
        scatters = self.shards_gradients
        collects = scatters or (self.has_masters and self.engine != "zero1")
        worst = training(
            pass_,
            offloaded=config.activation_offload,
            accumulated=accumulated and not collects,
            shards=config.ranks if scatters else 1,
        )
        if scatters and not self.is_zero:  # traced in the compute dtype, stored in the optimizer's dtype
            worst = replace(worst, gradients=worst.gradients * self.trainable_bytes // self._computed_bytes)
        # An optimizer step needs all gradients, and no activations. Masters accumulate their own gradients, which stay
        # in memory during all passes of a step. Released gradients do not exist at the step: a parameter is updated in
        # the backward pass of its block, with the block's activations and the gradient in memory.
        is_released = config.optimizer_release_gradients
        gradients = 0 if is_released else self._share(self._gradient_bytes, is_sharded=scatters)
        collected = gradients if collects and accumulated else 0
        if self.is_zero:  # the optimizer has another copy of its share, in fp32
            gradients += self._share(self.trainable_bytes, is_sharded=True)
        if worst.total + collected >= gradients:
            self._trainable_adder(memory)("gradients", worst.gradients + collected)
            memory.device("activations", worst.saved)
            stepping = STEP_BYTES[self._device] if is_released else 0
            memory.device("workspace", worst.workspace + self._unpacked + stepping)
        else:
            self._trainable_adder(memory)("gradients", gradients)
        memory.device("reduction bucket", self._reduction_bytes)
        memory.ram("offloaded activations", worst.host_inputs)
        if self.workload.samples_images and not config.offload_during_startup:
            # The decoder stays loaded after the first validation image.
            self._add_autoencoder(memory, decoder_shapes(self.architecture.autoencoder))
        self._add_batch(memory, pass_, is_training=True)
        memory.disk("checkpoints", (config.checkpoints_total_limit + 1) * self.checkpoint_bytes)
        if self.is_full:  # in BFL's layout; the diffusers folder links to the last checkpoint
            memory.disk("single file", self._exported_model_bytes * (2 if config.use_ema else 1))
        width, height = self.workload.bucket
        references = f" + {self.workload.references} reference tokens" if self.workload.references else ""
        return memory.plan("train", f"{width}x{height}{references} × {self.workload.batch}{self._residency_text}", read)

    def batches_guidance(self, size: tuple[int, int]) -> bool:
        """Whether the two predictions of classifier-free guidance are one batch of two.

        On an accelerator they are, if that needs no more memory than training or than one prediction; on a CPU never,
        as in `sample`. Batching changes the last bits of a result, so the choice depends only on the options and the
        training images, not on free memory or the number of processes.
        """
        if self.machine.accelerator is None or self.has_preview or not self._has_two_predictions:
            return False
        single = self
        if self.config.ranks > 1:
            single = replace(self, config=self.config.model_copy(update={"num_processes": 1}))
        both, one = single._validation(size, 2), single._validation(size, 1)
        return both.total("accelerator") <= max(one.total("accelerator"), single.train().total("accelerator"))

    @property
    def _has_two_predictions(self) -> bool:
        """Whether validation uses classifier-free guidance."""
        return validation_scales(self.config).real != 1

    def validation(self, size: tuple[int, int]) -> PhasePlan:
        """A validation image of `size` during training."""
        return self._validation(size, 2 if self.batches_guidance(size) else 1)

    def _validation(self, size: tuple[int, int], batch: int) -> PhasePlan:
        """Like `validation`, with `batch` predictions in a pass."""
        width, height = size
        memory = _PhaseMemory(self.machine, self.config.ranks_per_machine)
        self._add_state(memory)
        read = self._add_validation(memory, size, batch)
        return memory.plan("validation", f"{width}x{height}, {self._passes_text(batch)}", read)

    @property
    def has_preview(self) -> bool:
        """Whether another model, `validation_preview_model`, generates the validation images."""
        return self.config.validation_preview_model is not None and not self.is_full

    @cached_property
    def offloads_base(self) -> bool:
        """Whether base, optimizer state and EMA move to host memory while the preview model generates images.

        True if the accelerator cannot also hold the preview model. Never without an accelerator.
        """
        accelerator = self.machine.accelerator
        if accelerator is None or not self.has_preview:
            return False
        totals = (self._preview(size, is_base_offloaded=False).total("accelerator") for size in self.config.sizes)
        return max(totals) > plannable_bytes(accelerator)

    def preview(self, size: tuple[int, int]) -> PhasePlan:
        """A validation image of `size` during training, generated by `validation_preview_model`."""
        return self._preview(size, is_base_offloaded=self.offloads_base)

    def _preview(self, size: tuple[int, int], *, is_base_offloaded: bool) -> PhasePlan:
        """Like `preview`, with the base in host memory if `is_base_offloaded`."""
        memory, training_memory = (
            _PhaseMemory(self.machine, self.config.ranks_per_machine),
            _PhaseMemory(self.machine, self.config.ranks_per_machine),
        )
        self._add_state(training_memory)
        resident = ("adapters", "slots for blocks")
        for (name, tier), bytes_ in training_memory.sizes.items():
            if is_base_offloaded and tier == "accelerator" and name not in resident:
                memory.ram("offloaded base", bytes_)
            else:
                memory.add(name, tier, bytes_)
        read = self._add_transformer(memory, "preview ") + self._add_validation(memory, size)
        width, height = size
        location = ", base in RAM" if is_base_offloaded else ""
        return memory.plan("preview", f"{width}x{height}, {self._passes_text()}{location}", read)

    def _passes_text(self, batch: int = 1) -> str:
        """The number of transformer passes of a validation image, for the phase's description."""
        passes = self.config.validation_num_inference_steps * (1 + self._has_two_predictions) // batch
        return f"{passes} passes{' of two' * (batch == 2)}"

    def _add_validation(self, memory: _PhaseMemory, size: tuple[int, int], batch: int = 1) -> int:
        """Add the memory that a validation image needs besides transformers, with `batch` predictions in a pass.

        Returns the bytes that are read from disk.
        """
        config, autoencoder = self.config, self.architecture.autoencoder
        pass_ = self.transformer_pass(size, batch, self.workload.prompt_reference_tokens)
        denoising = sampling(pass_) + self._unpacked
        decoding = decoding_bytes(autoencoder, self._processed_pixels(size, 1), self.vae_dtype)
        weights, _ = autoencoder_bytes(decoder_shapes(autoencoder), self.vae_dtype)
        if config.offload_during_startup and denoising >= weights + decoding:
            memory.device("activations", denoising)
        else:
            self._add_autoencoder(memory, decoder_shapes(autoencoder))
            memory.device("activations", decoding if config.offload_during_startup else max(denoising, decoding))
        # Trainable parameters are swapped for their EMA, or for a schedule-free optimizer's averaged weights.
        averaged = config.use_ema and config.ema_validation != "none" and not self.has_masters
        copies = int(averaged) + int(known_optimizer(config.optimizer).library == "schedulefree")
        memory.device("parameters set aside", copies * self._share(self.trainable_bytes, is_sharded=self._shards_state))
        self._add_batch(memory, pass_)
        return weights

    @property
    def _unpacked(self) -> int:
        """Bytes of the largest quantized matrix while it is dequantized; packed codes are expanded to bytes first."""
        if self._precision == NO_CHANGE:
            return self._weights.largest_matrix * self.dtype.itemsize if self._native_precisions else 0
        return self._weights.largest_matrix * (self.dtype.itemsize + int(PRECISIONS[self._precision].bits < 8))

    @property
    def _native_precisions(self) -> tuple[tuple[str, str], ...]:
        """Linears that keep their file's precision, and that precision."""
        return self.architecture.native_precisions if self._precision == NO_CHANGE and not self.is_full else ()

    @property
    def _precision(self) -> str:
        """The precision of the base. Trainable weights are not quantized."""
        return NO_CHANGE if self.is_full else self.config.base_model_precision

    @property
    def _is_mapped(self) -> bool:
        """Whether the base's weights are views of the memory-mapped file until they are moved."""
        return self._precision == NO_CHANGE and not self.architecture.is_decoded

    @property
    def _weights(self) -> TransformerBytes:
        """Bytes of the transformer's weights."""
        spec, ranks = self.architecture.transformer, self.config.ranks
        return transformer_bytes(spec, self._precision, self.dtype, ranks, self._native_precisions)

    @property
    def _reduction_bytes(self) -> int:
        """Bytes of the bucket for all-reduce or reduce-scatter of gradients."""
        if self.engine == "single":
            return 0
        if self.is_zero:
            buckets = 2 if self.engine == "zero2" and self._zero.overlap_comm else 1
            return buckets * self._zero.reduce_bucket_size * self._computed_bytes // self.trainable_parameters
        if self.is_full and self.is_sharded:
            return max(self._weights.blocks) * 4 // self.dtype.itemsize
        largest = (
            self._weights.largest_matrix * self.trainable_bytes // self.trainable_parameters if self.is_full else 0
        )
        return min(max(BUCKET_BYTES, largest), self.trainable_bytes)

    def _add_state(self, memory: _PhaseMemory) -> int:
        """Add everything that stays in memory between steps. Returns the bytes that are read from disk."""
        config = self.config
        read = self._add_transformer(memory)
        add_state = self._trainable_adder(memory)
        if not self.is_full:
            memory.device("adapters", self._share(self.trainable_bytes, is_sharded=self.shards_trainable))
        # ZeRO-1 and ZeRO-2 copy trainable weights even if they are fp32; ZeRO-3 copies fp32 only to host memory.
        is_alias = self.engine == "zero3" and self._computed_bytes == self.trainable_bytes
        if self.has_masters and (not is_alias or config.offloads("offload_optimizer")):
            add_state("masters", self._share(self.trainable_bytes, is_sharded=self._shards_state))
        add_state("optimizer", self._share(self.optimizer_bytes, is_sharded=self._shards_state))
        if config.use_ema:
            average = self._share(4 * self.trainable_parameters, is_sharded=self._shards_state)
            (memory.ram if config.is_average_on_cpu else add_state)("average", average)
        return read

    @property
    def _shards_state(self) -> bool:
        """Whether each process holds only its share of the optimizer state, masters and EMA."""
        return self.is_zero or self.shards_trainable

    def _trainable_adder(self, memory: _PhaseMemory) -> Callable[[str, int], None]:
        """The method of `memory` that adds masters, gradients and optimizer state of trainable parameters.

        They are in RAM if their shards or the optimizer are offloaded there, else on the device.
        """
        in_ram = self.is_full and self.engine == "fsdp2" and self.config.fsdp_cpu_offload
        return memory.ram if in_ram or (self.is_zero and self.config.offloads("offload_optimizer")) else memory.device

    def _add_transformer(self, memory: _PhaseMemory, prefix: str = "") -> int:
        """Add a transformer's weights, with `prefix` before their names. Returns the bytes that are read from disk."""
        config, weights = self.config, self._weights
        if self.is_sharded:
            self._add_shards(memory, prefix)
        elif self.is_full or not config.enable_group_offload:
            memory.device(f"{prefix}weights", weights.total)
        else:
            blocks = self._streaming
            memory.device(f"{prefix}weights", weights.outside_blocks)
            memory.device(f"{prefix}resident blocks", blocks.resident)
            memory.device(f"{prefix}slots for blocks", blocks.slots)
            if config.group_offload_to_disk_path is None:
                memory.ram(f"{prefix}streamed blocks", blocks.streamed)
            else:
                # All blocks are in memory before they are written to disk, unless they are views of the mapped file.
                memory.ram(f"{prefix}streamed blocks", 0 if self._is_mapped else blocks.streamed)
                memory.ram(f"{prefix}read buffers", blocks.read_buffers)
                memory.disk(f"{prefix}streamed blocks", blocks.streamed)
        return transformer_bytes(self.architecture.transformer, NO_CHANGE, torch.bfloat16).total

    def _add_shards(self, memory: _PhaseMemory, prefix: str) -> None:
        """Add a sharded transformer: this process's shards, and the weights that are gathered at a time.

        FSDP2 gathers the weights outside the blocks, and those of `GATHERED_BLOCKS` or all blocks. ZeRO-3 gathers as
        many as its settings allow, and the running layer.
        """
        config, weights = self.config, self._weights
        is_offloaded = config.offloads("offload_param") if self.is_zero else config.fsdp_cpu_offload
        if self.is_zero or not self.has_masters:  # masters are FSDP2's shards
            (memory.ram if is_offloaded else memory.device)(f"{prefix}shards of weights", weights.shards)
        if self.is_zero:
            live = self._zero.stage3_max_live_parameters + self._zero.stage3_prefetch_bucket_size
            gathered = min(weights.total, live * weights.total // self._parameter_count + max(weights.largest_layers))
            if not self._is_mapped:
                memory.ram(f"{prefix}weights while loading", weights.total)
        else:
            blocks = sorted(weights.blocks)[-GATHERED_BLOCKS if config.fsdp_reshard_after_forward else 0 :]
            gathered = weights.outside_blocks + sum(blocks)
        memory.device(f"{prefix}gathered weights", gathered)

    def _add_batch(self, memory: _PhaseMemory, pass_: TransformerPass, *, is_training: bool = False) -> None:
        """Add a batch: latents, noise, noisy latents, velocity and prediction in fp32, references, contexts and rotary
        tables (with references, one table for each sample).

        In training, also add the base model's prediction and the contexts of a second prompt, if the options require
        them. Host memory holds this batch and the next.
        """
        spec, batch = pass_.spec, pass_.batch
        latents, references = (
            batch * count * spec.in_channels * 4 for count in (pass_.image_tokens, pass_.reference_tokens)
        )
        contexts = batch * pass_.text_tokens * self._context_row
        tables = (batch if references else 1) * pass_.total_tokens * spec.head_dim * 4
        if is_training and self.config.preserves:
            contexts *= 2
        has_base = is_training and (self.config.preserves or self.config.masked_loss_prior > 0)
        memory.device("batch", (6 if has_base else 5) * latents + references + contexts + tables)
        if self.machine.accelerator is not None:
            memory.ram("batch", 2 * (latents + references + contexts))


def _resolved(config: RunConfig, resident: int, *, ahead: bool) -> RunConfig:
    """`config` with `resident` blocks, and prefetch on the copy stream if `ahead`."""
    choices = {"group_offload_resident_blocks": str(resident), "group_offload_use_stream": str(ahead).lower()}
    return config.model_copy(update=choices)


def _peak_bytes(phase: PhasePlan) -> int:
    """Accelerator bytes of a phase, or RAM without an accelerator."""
    return phase.total("accelerator") or phase.total("ram")
