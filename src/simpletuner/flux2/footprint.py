"""Bytes of a FLUX.2 in every phase of a run, from the shapes of its modules and the options. No weights are read."""

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
from simpletuner.config.previews import drawing_flavour
from simpletuner.config.run import RunConfig
from simpletuner.flux2.activations import Adapted, Pass, sampling, training
from simpletuner.flux2.configs import Component, Config, read_component_config
from simpletuner.flux2.lora import wanted_ranges
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
    Machine,
    MemoryPart,
    MemoryPlan,
    MemoryTier,
    PhasePlan,
    PlannedPhase,
    bytes_to_fill,
)
from simpletuner.memory.precision import DTYPES, stored_bytes
from simpletuner.memory.wire import Wire, all_reduce_bytes, shard_exchange_bytes
from simpletuner.memory.world import BUCKET_BYTES

# What the model is


@dataclass(frozen=True)
class Architecture:
    """The shapes of a FLUX.2, and what is known of its files."""

    transformer: TransformerSpec
    text: TextSpec
    autoencoder: AutoencoderSpec
    text_layers: tuple[int, ...]
    text_length: int
    """Tokens of a context, padding included."""
    has_whole_contexts: bool
    """Whether each row of a context is computed and cached, padding too: the flavour pads on the right."""
    held: tuple[tuple[str, str], ...] = ()
    """Linears of blocks that the transformer's file holds in a precision of ours, and which."""
    is_decoded: bool = False
    """Whether that file is quantized, so that no weight is a part of the mapped file."""

    @classmethod
    def of(cls, config: RunConfig) -> "Architecture":
        """Read from the configs of local files; what is not on this machine's disk is taken for the flavour's own.
        Nothing is downloaded, nothing made.

        Raises:
            AccessError: a local config is no FLUX.2's.
        """
        flavour = FLAVOURS[config.model_flavour]
        transformer, text, autoencoder = flavour.transformer, flavour.text.encoder, flavour.autoencoder
        held: tuple[tuple[str, str], ...] = ()
        is_decoded = False
        single = single_files(config)
        if file := single.get("transformer"):
            transformer = transformer_spec(Weights((file,), None), file.name)
            stored = stored_weights((file,))
            is_decoded = not all(weight.is_plain for weight in stored.values())
            held = tuple(native_precisions(stored, transformer_renaming(stored)).items())
        elif found := _local(config, "transformer", config.pretrained_transformer_model_name_or_path):
            transformer = transformer_spec(Weights((), found), "transformer")
        try:
            if file := single.get("text_encoder"):
                text = text_spec_in(file, text)
            elif found := _local(config, "text_encoder", config.pretrained_text_encoder_model_name_or_path):
                text = text_from_config(found)
            if file := single.get("vae"):
                autoencoder = autoencoder_spec_in(file, autoencoder)
            elif found := _local(config, "vae", config.pretrained_vae_model_name_or_path):
                autoencoder = autoencoder_from_config(found)
        except KeyError as error:
            lack = f"a text encoder's config.json has no {error}"
            raise AccessError.of(lack, f"that of {flavour.title}'s text encoder") from None
        return cls(
            transformer,
            text,
            autoencoder,
            config.custom_text_encoder_intermediary_layers or flavour.text.layers,
            config.tokenizer_max_length or flavour.text.length,
            flavour.text.padding_side == "right",
            held,
            is_decoded,
        )


def _local(config: RunConfig, component: Component, override: str | None) -> Config | None:
    """The config of a component that lies in a local folder."""
    base = config.pretrained_model_name_or_path
    places = [Path(with_home(override)) / component, Path(with_home(override))] if override else []
    places += [Path(with_home(base)) / component] if base and not override else []
    for place in places:
        with file_errors_reported(place, AccessError, doing="read"):
            if (place / "config.json").is_file():
                return read_component_config(component, place / "config.json")
    return None


@dataclass(frozen=True)
class Workload:
    """What goes through the model, and how much of it."""

    bucket: tuple[int, int]
    """(width, height) in pixels of the largest pictures that are trained."""
    batch: int
    """Pictures in one forward pass."""
    references: int = 0
    """Reference tokens of a sample of that size, at most."""
    strict_references: int = 0
    """Those of them whose references have the image's size."""
    encoded: tuple[int, int] | None = None
    """(width, height) of the largest picture that the VAE encodes; None for that of `bucket`."""
    drawn_references: int = 0
    """Reference tokens of a validation image, at most."""
    forced_share: float = 0.0
    """The most of an image's tokens that TREAD keeps because they are under a mask; 0 where nobody has looked."""
    images: int | None = None
    """Of all sets, held-out ones too, without references; None where nobody has looked."""
    pictures: int | None = None
    """Latents to cache, those of references too; None where nobody has looked."""
    captions: int | None = None
    """Contexts to cache."""
    caption_tokens: int | None = None
    """Tokens of the longest caption, template included; None for as many as a context has."""
    tokenizer: Path | None = None
    """The folder of the tokenizer that counted them; None where they are estimated, or nobody has looked."""
    draws: bool = True
    """Whether pictures are made along the way."""
    steps: int | None = None
    """Optimizer steps of the run; None where that depends on pictures that nobody has looked at."""
    train_images: int | None = None
    """Images that are trained, held-out ones left out; None where nobody has looked."""
    visits: float | None = None
    """How often the run sees each of them, on average."""

    @property
    def largest_encoded(self) -> tuple[int, int]:
        """(width, height) of the largest picture that the VAE encodes."""
        return self.encoded or self.bucket


def tokens_of(size: tuple[int, int]) -> int:
    """Image tokens of a picture of (width, height) pixels."""
    return (size[0] // PIXELS_PER_TOKEN) * (size[1] // PIXELS_PER_TOKEN)


# What its weights take


def _stored(shape: tuple[int, int], precision: str, dtype: torch.dtype) -> int:
    try:
        return stored_bytes(shape, precision, dtype.itemsize)
    except ValueError as error:
        raise ConfigError.of(
            f"{precision} cannot hold this model: {error}", remedy="int8-quanto holds every shape."
        ) from None


@dataclass(frozen=True)
class TransformerBytes:
    """Of a transformer's weights, as they are held."""

    blocks: tuple[int, ...]
    """Of each block, doubles first."""
    rest: int
    """Embedders, modulation, last layers."""
    largest_layers: tuple[int, ...]
    """Of each block's largest module that has weights of its own."""
    largest_matrix: int
    """Numbers of the largest matrix of a block."""
    shards: int
    """Of what each process holds of all weights where they are sharded by rows, with the padding of the last one."""

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.rest


@lru_cache(maxsize=64)
def transformer_bytes(
    spec: TransformerSpec,
    precision: str,
    dtype: torch.dtype,
    ranks: int = 1,
    held: tuple[tuple[str, str], ...] = (),
) -> TransformerBytes:
    """By walking the module: the blocks' matrices in `precision`, everything else in `dtype`.

    Args:
        ranks: processes that the shards are for.
        held: Linears of blocks that are in another precision, and which.

    Raises:
        ConfigError: the precision cannot hold one of them.
    """
    transformer = empty_transformer(spec)
    others = dict(held)
    own = {
        id(each): others.get(name.removesuffix(".weight"), precision) for name, each in transformer.named_parameters()
    }

    def size_of(parameter: nn.Parameter) -> int:
        if parameter.ndim != 2:
            return parameter.numel() * dtype.itemsize
        rows, columns = parameter.shape
        return _stored((rows, columns), own[id(parameter)], dtype)

    def shard(parameter: nn.Parameter, size: int) -> int:
        rows = parameter.shape[0]
        return math.ceil(size / rows * math.ceil(rows / ranks))

    inside = [[*block.parameters()] for block in transformer.blocks]
    matrices = [parameter for block in inside for parameter in block if parameter.ndim == 2]
    within = {id(parameter) for block in inside for parameter in block}
    rest = [parameter for parameter in transformer.parameters() if id(parameter) not in within]
    return TransformerBytes(
        blocks=tuple(sum(map(size_of, block)) for block in inside),
        rest=sum(p.numel() * dtype.itemsize for p in rest),
        largest_layers=tuple(max(map(size_of, block)) for block in inside),
        largest_matrix=max(parameter.numel() for parameter in matrices),
        shards=sum(shard(parameter, size_of(parameter)) for block in inside for parameter in block)
        + sum(shard(parameter, parameter.numel() * dtype.itemsize) for parameter in rest),
    )


def adapted_blocks(spec: TransformerSpec, options: LoraOptions) -> tuple[Adapted, ...]:
    """What the options train in each block, doubles first; of `init_lora`, as if it had the options' target.

    Raises:
        ConfigError: a target that matches nothing.
    """
    return _adapted(spec, options.flux_lora_target, options.peft_lora_target_modules)


@lru_cache(maxsize=16)
def _adapted(spec: TransformerSpec, target: str, modules: str | tuple[str, ...] | None) -> tuple[Adapted, ...]:
    options = LoraOptions.model_validate({"flux_lora_target": target, "peft_lora_target_modules": modules})
    ranges = wanted_ranges(empty_transformer(spec), options)
    names = [f"transformer_blocks.{index}." for index in range(spec.double_blocks)]
    names += [f"single_transformer_blocks.{index}." for index in range(spec.single_blocks)]
    return tuple(
        tuple((name.removeprefix(block), place) for name, place in ranges.items() if name.startswith(block))
        for block in names
    )


@lru_cache(maxsize=64)
def _adapter_parameters(blocks: tuple[Adapted, ...], rank: int) -> int:
    sides = (side for block in blocks for _, place in block for side in (place.rows, place.columns))
    return rank * sum(stop - start for start, stop in sides)


@lru_cache(maxsize=64)
def _saved_parameters(spec: TransformerSpec, blocks: tuple[Adapted, ...], rank: int) -> int:
    """Of the exported LoRA, which is expanded to whole matrices."""
    modules = empty_transformer(spec).blocks
    linears = (block.get_submodule(name) for block, own in zip(modules, blocks, strict=True) for name, _ in own)
    return rank * sum(each.in_features + each.out_features for each in linears if isinstance(each, nn.Linear))


def recomputed_blocks(config: RunConfig, blocks: int) -> tuple[bool, ...]:
    """Of each block, whether the backward pass computes it again."""
    every = config.gradient_checkpointing_interval
    return tuple(
        config.gradient_checkpointing and (every is None or (index + 1) % every != 0) for index in range(blocks)
    )


def text_bytes(text: TextSpec, precision: str, dtype: torch.dtype) -> tuple[int, int]:
    """Of the embedding, and of a layer."""
    layer = sum(_stored(shape, precision, dtype) for shape in text.linears)
    return text.vocabulary * text.hidden * dtype.itemsize, layer + text.scales * dtype.itemsize


def text_activation_bytes(text: TextSpec, tokens: int, kept: int, dtype: torch.dtype) -> int:
    """Of a batch of `tokens` in the middle of a feed-forward, its widest place: gate, value and their product; beside
    them the stream, its norm, and `kept` states.
    """
    return tokens * (3 * text.inner + (2 + kept) * text.hidden) * dtype.itemsize


def resident_text_bytes(
    text: TextSpec, layers: Sequence[int], *, tokens: int, precision: str, dtype: torch.dtype
) -> tuple[int, int]:
    """Of a text encoder that is read up to the last of `layers`: its weights, and what comes beside them, a batch of
    `tokens` or, while it is quantized, the plain weight of one Linear at a time.
    """
    embedding, layer = text_bytes(text, precision, dtype)
    plain = 0 if precision == NO_CHANGE else max(map(math.prod, text.linears)) * dtype.itemsize
    activations = text_activation_bytes(text, tokens, len(layers) - 1, dtype)
    return embedding + max(layers) * layer, max(activations, plain)


def autoencoder_bytes(half: Sequence[Sequence[int]], dtype: torch.dtype) -> tuple[int, int]:
    """Of all weights of the half that encodes or decodes, and of its largest layer."""
    sizes = [math.prod(shape) * dtype.itemsize for shape in half]
    return sum(sizes), max(sizes)


def encoding_bytes(autoencoder: AutoencoderSpec, pixels: int, dtype: torch.dtype) -> int:
    """Of a picture on its way in: five times what its first level has, where that level is halved."""
    return 5 * autoencoder.channels[0] * pixels * dtype.itemsize


def decoding_bytes(autoencoder: AutoencoderSpec, pixels: int, dtype: torch.dtype) -> int:
    """Of a picture on its way out: three times what the second level has, after it is doubled."""
    return 3 * autoencoder.channels[1] * pixels * dtype.itemsize


def checkpoint_bytes(config: RunConfig, exported: int, kept: int, state: int) -> int:
    """Size of an export and of what else is kept of the trained numbers, for them and their average, and of the
    optimizer's `state`.
    """
    return (exported + kept) * (2 if config.use_ema else 1) + state


# The phases

GATHERED_BLOCKS = 2
"""Sharded blocks that are whole on a device at a time: the one at work and the next."""

ZERO_ENGINES: tuple[Engine, ...] = ("zero1", "zero2", "zero3")
"""By stage."""

STEP_BYTES: dict[MemoryTier, int] = {"accelerator": 44 * 2**22, "ram": 44 * 2**16}
"""Temporary memory of a step on bf16 weights, which goes by chunks (`train.adamw_bf16`)."""


class _Room:
    """Collects the parts of a phase, as one of a machine's `ranks` processes has them. On a machine without an
    accelerator, `device` is its memory.
    """

    def __init__(self, machine: Machine, ranks: int) -> None:
        self._device: MemoryTier = "ram" if machine.accelerator is None else "accelerator"
        self._ranks = ranks
        self.sizes: dict[tuple[str, MemoryTier], int] = {}

    def device(self, name: str, size: int) -> None:
        self.add(name, self._device, size)

    def ram(self, name: str, size: int) -> None:
        self.add(name, "ram", size)

    def disk(self, name: str, size: int) -> None:
        self.add(name, "disk", size)

    def add(self, name: str, place: MemoryTier, size: int) -> None:
        if size:
            self.sizes[name, place] = self.sizes.get((name, place), 0) + size

    def plan(self, phase: PlannedPhase, what: str, read: int) -> PhasePlan:
        shared = {"accelerator": 1, "ram": self._ranks, "disk": 1}
        parts = (MemoryPart(name, place, shared[place] * size) for (name, place), size in self.sizes.items())
        return PhasePlan(phase, what, tuple(parts), read)


@dataclass(frozen=True)
class StreamedBlocks:
    """Bytes of a transformer's blocks of which some are resident and the others are streamed."""

    resident: int
    slots: int
    """Of all slots together."""
    streamed: int
    """Of the packed copies."""
    read_buffers: int
    """Of those into which groups are read from a disk."""

    @property
    def on_device(self) -> int:
        return self.resident + self.slots


@dataclass(frozen=True)
class Footprint:
    """The phases of a run of `config`."""

    config: RunConfig
    architecture: Architecture
    work: Workload
    machine: Machine

    def plan(self) -> MemoryPlan:
        """All phases, in the order of the run."""
        phases = [self.text(), self.latents(), self.train()]
        if self.work.draws:
            draw = self.preview if self.has_preview else self.validation
            phases.append(max((draw(size) for size in self.config.sizes), key=_weight))
        config = self.config
        return MemoryPlan(self.machine, tuple(phases), config.ranks, self.engine, self.wire, config.num_machines)

    # Several processes

    @property
    def engine(self) -> Engine:
        """How the processes share the work."""
        if self.config.ranks == 1:
            return "single"
        if self.config.zero_stage:
            return ZERO_ENGINES[self.config.zero_stage - 1]
        return "fsdp2" if self.config.fsdp_enable else "ddp"

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed trains."""
        return self.engine in ZERO_ENGINES

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only its share of the transformer's blocks."""
        return self.engine in ("fsdp2", "zero3")

    @property
    def shards_trained(self) -> bool:
        """Whether each process holds only its share of the trainable parameters: FSDP2 leaves a LoRA whole."""
        return self.engine == "zero3" or (self.is_full and self.is_sharded)

    @property
    def shards_gradients(self) -> bool:
        """Whether each process keeps only its share of the gradients."""
        return self.engine == "zero2" or self.shards_trained

    def _share(self, size: int, *, is_sharded: bool) -> int:
        """What one process holds of `size` bytes."""
        return math.ceil(size / self.config.ranks) if is_sharded else size

    @cached_property
    def _zero(self) -> ZeroSettings:
        return ZeroSettings.model_validate(self.config.zero_optimization)

    @property
    def wire(self) -> Wire | None:
        """Bytes that a process sends in an optimizer step, without those of scheduled sampling, preservation, held-out
        loss and validation images. None for a single process.

        DDP: the gradients are summed once a step. FSDP2: sharded weights are gathered in each forward pass, and blocks
        that are dropped after it again in each backward pass; a LoRA's gradients are summed once a step, those of
        sharded weights are scattered in fp32 in each backward pass.

        ZeRO-1 sums the gradients once a step, ZeRO-2 in each backward pass; both then gather the new weights. (To sum
        is `use_multi_rank_bucket_allreduce`, on by default; a reduce-scatter would send half.) ZeRO-3 gathers all
        weights, trainable ones too, in each forward and each backward pass, which also scatters their gradients; of a
        frozen base the backward pass needs the blocks alone.
        """
        config, weights, ranks = self.config, self._weights, self.config.ranks
        passes, again = config.gradient_accumulation_steps, int(config.fsdp_reshard_after_forward)
        summed = all_reduce_bytes(self._gradient_bytes, ranks)
        gathered = 0
        if self.engine == "single":
            return None
        if self.engine in ("zero1", "zero2"):
            gathered = shard_exchange_bytes(self._gradient_bytes, ranks)
            summed *= passes if self.shards_gradients else 1
        elif self.engine == "zero3":
            forward = weights.total + (0 if self.is_full else self.trained_bytes)
            backward = forward - (0 if self.is_full else weights.rest)
            gathered = passes * shard_exchange_bytes(forward + backward, ranks)
            summed = passes * shard_exchange_bytes(self._gradient_bytes, ranks)
        elif self.engine == "fsdp2":
            # Those outside the blocks stay whole from the forward pass to the end of the backward pass.
            gathered = passes * shard_exchange_bytes(weights.total + again * sum(weights.blocks), ranks)
            if self.is_full:
                summed = passes * shard_exchange_bytes(4 * self.trained, ranks)
        return Wire(gathered, summed, config.num_machines)

    @property
    def _gradient_bytes(self) -> int:
        """Of all gradients as they are summed and kept: for masters in fp32, but under ZeRO as they are computed."""
        return self._computed_bytes if self.is_zero else self.trained_bytes

    @property
    def _computed_bytes(self) -> int:
        """Of all gradients as the backward pass leaves them."""
        return self.trained * (self.dtype.itemsize if self.is_full else 4)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.base_dtype]

    @property
    def vae_dtype(self) -> torch.dtype:
        return DTYPES[self.config.vae_dtype]

    @property
    def context_bytes(self) -> int:
        """Of one caption's cached context: all rows, or those of its text and one of padding."""
        return (self._text_tokens + (0 if self.architecture.has_whole_contexts else 1)) * self._context_row

    @property
    def _text_tokens(self) -> int:
        """Rows that the text encoder computes for the longest caption."""
        length = self.architecture.text_length
        if self.architecture.has_whole_contexts or self.work.caption_tokens is None:
            return length
        return min(self.work.caption_tokens, length)

    @property
    def latent_bytes(self) -> int:
        """Of one picture's cached latent at the largest size, fp32."""
        return tokens_of(self.work.largest_encoded) * self.architecture.transformer.in_channels * 4

    @property
    def _context_row(self) -> int:
        return self.architecture.transformer.context_dim * self.dtype.itemsize

    # Text

    @property
    def text_mode(self) -> str:
        """resident or streamed. `auto` asks the machine, as the run does."""
        config, mode = self.config, self.config.text_encoder_mode
        if config.group_offload_text_encoder:
            return "streamed"
        if mode != "auto":
            return mode
        there = self.machine.ram if self.machine.accelerator is None else self.machine.accelerator
        return "resident" if self._text("resident").total(self._device) <= there else "streamed"

    @property
    def _device(self) -> MemoryTier:
        return "ram" if self.machine.accelerator is None else "accelerator"

    def text(self) -> PhasePlan:
        """Captions to contexts."""
        return self._text(self.text_mode)

    def _text(self, mode: str) -> PhasePlan:
        config, text = self.config, self.architecture.text
        layers = self.architecture.text_layers
        depth, kept = max(layers), len(layers)
        length = self._text_tokens
        captions = math.ceil((self.work.captions or 0) / config.ranks_per_machine)  # as if no files were shared
        together = min(config.text_encoder_batch_size, captions or config.text_encoder_batch_size)
        batch = together * length
        precision = config.text_encoder_1_precision
        room = _Room(self.machine, self.config.ranks_per_machine)
        if mode == "resident":
            weights, beside = resident_text_bytes(text, layers, tokens=batch, precision=precision, dtype=self.dtype)
            room.device("weights", weights)
            room.device("activations", beside)
            read = weights
        else:
            _, layer = text_bytes(text, precision, self.dtype)
            room.device("weights", layer)
            room.device("activations", text_activation_bytes(text, batch, 0, self.dtype))
            tokens = max(captions, together) * length
            portion = min(tokens, max(PORTION_TOKENS, batch))
            states = portion * text.hidden * kept * self.dtype.itemsize
            room.ram("states", min(states, MEMORY_BYTES))
            room.disk("states", max(0, states - MEMORY_BYTES))
            read = depth * layer * math.ceil(tokens / portion)
        # A batch is stacked and cut apart again; files are written some at a time.
        waiting = min(config.write_batch_size + together, max(captions, together))
        room.ram("contexts", waiting * length * self._context_row + batch * self._context_row)
        room.disk("cache", (self.work.captions or 0) * self.context_bytes)
        return room.plan("text", f"{mode}, {together} × {length} tokens", read)

    # Latents

    def latents(self) -> PhasePlan:
        """Pictures to latents."""
        config, autoencoder = self.config, self.architecture.autoencoder
        width, height = self.work.largest_encoded
        pictures = math.ceil((self.work.pictures or 0) / config.ranks_per_machine)
        batch = min(config.vae_batch_size, pictures or config.vae_batch_size)
        room = _Room(self.machine, self.config.ranks_per_machine)
        read = self._hold_autoencoder(room, encoder_shapes(autoencoder))
        pixels = self._seen_pixels((width, height), batch)
        room.device("activations", encoding_bytes(autoencoder, pixels, self.vae_dtype))
        # Of each pixel of a batch, fp32 and as the VAE wants it; of those that are opened ahead, bytes.
        room.device("pictures", batch * width * height * 3 * (4 + self.vae_dtype.itemsize))
        room.ram("pictures", (batch + 2 * config.workers) * width * height * 3)
        room.disk("cache", (self.work.pictures or 0) * self.latent_bytes)
        return room.plan("latents", f"{width}x{height} × {batch}", read)

    def _hold_autoencoder(self, room: _Room, half: Sequence[Sequence[int]]) -> int:
        """Returns what is read for it."""
        weights, largest = autoencoder_bytes(half, self.vae_dtype)
        if self.config.group_offload_vae:
            slots = 2 if self._device == "accelerator" and self.config.copies_ahead("cuda") else 1
            room.device("weights of the VAE", slots * largest)
            room.ram("weights of the VAE", weights)
        else:
            room.device("weights of the VAE", weights)
        return weights

    def _seen_pixels(self, size: tuple[int, int], batch: int) -> int:
        """That the autoencoder works on at a time."""
        config, tile = self.config, self.architecture.autoencoder.tile
        width, height = (min(side, tile) for side in size) if config.vae_enable_tiling else size
        return width * height * (1 if config.vae_enable_slicing else batch)

    # Training

    @property
    def streams_blocks(self) -> bool:
        return self.config.enable_group_offload and not self.is_full

    @cached_property
    def settled(self) -> RunConfig:
        """`config` with a number of resident blocks and a choice of the stream in place of each `auto` of the group
        offload: as many blocks as `bytes_to_fill` has room for in training and validation, beside two slots where both
        fit. On a machine without an accelerator no block and one slot.
        """
        config, there = self.config, self.machine.accelerator
        count, stream = config.resident_blocks, config.group_offload_use_stream
        if not self.streams_blocks or (count is not None and stream != AUTO):
            return config
        if there is None:
            return _settled(config, count or 0, ahead=False)
        beside, ahead = self._beside_blocks, stream == "true"
        if stream == AUTO:
            ahead = beside + self.streamed_blocks(count or 0, ahead=True).on_device <= there
        if count is None:
            count = self.architecture.transformer.blocks
            while count and beside + self.streamed_blocks(count, ahead=ahead).on_device > bytes_to_fill(there):
                count -= 1
        return _settled(config, count, ahead=ahead)

    @property
    def _beside_blocks(self) -> int:
        """Bytes on the accelerator that training or validation takes beside the blocks, where that is more."""
        bare = replace(self, config=_settled(self.config, 0, ahead=False))
        phases = [bare.train(), *(bare._validation(size, 1) for size in self.config.sizes if self.work.draws)]
        most = max(phase.total("accelerator") for phase in phases) - bare.streamed_blocks(0, ahead=False).on_device
        # While a preview model is streamed, the base's slots stay beside its own.
        return most + (self.streamed_blocks(0, ahead=True).slots if self.has_preview and self.work.draws else 0)

    def streamed_blocks(self, resident: int, *, ahead: bool) -> StreamedBlocks:
        """The blocks' bytes with `resident` blocks on the accelerator, the others streamed through one slot, or two
        where the next group is copied `ahead`."""
        weights, config = self._weights, self.config
        stay = resident_indices(self.architecture.transformer, resident)
        going = [index for index in range(len(weights.blocks)) if index not in stay]
        if config.group_offload_type == "leaf_level":
            largest = max((weights.largest_layers[index] for index in going), default=0)
            groups = 2 * len(going)  # at least
        else:
            sizes = [weights.blocks[index] for index in going]
            every = config.group_offload_blocks_per_group
            together = [sum(sizes[start : start + every]) for start in range(0, len(sizes), every)]
            largest, groups = max(together, default=0), len(together)
        streamed = sum(weights.blocks[index] for index in going)
        return StreamedBlocks(
            resident=sum(weights.blocks) - streamed,
            slots=min(1 + ahead, groups) * largest,
            streamed=streamed,
            read_buffers=0 if config.group_offload_to_disk_path is None else min(2, groups) * largest,
        )

    @property
    def _streaming(self) -> StreamedBlocks:
        config = self.settled
        ahead = config.copies_ahead("cpu" if self.machine.accelerator is None else "cuda")
        return self.streamed_blocks(config.resident_blocks or 0, ahead=ahead)

    @property
    def _residency(self) -> str:
        """In words, where blocks are streamed."""
        count, blocks = self.settled.resident_blocks or 0, self.architecture.transformer.blocks
        if not self.streams_blocks or (self.machine.accelerator is None and not count):
            return ""
        return f", {min(count, blocks)} of {blocks} blocks resident"

    @property
    def _adapted(self) -> tuple[Adapted, ...]:
        return adapted_blocks(self.architecture.transformer, self.config)

    @property
    def is_full(self) -> bool:
        return self.config.model_type == "full"

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer steps on fp32 copies; those of DeepSpeed are there for a LoRA and fp32 weights too."""
        return self.config.has_masters or self.is_zero

    @property
    def trained(self) -> int:
        """Numbers that the optimizer steps on."""
        return self._numbers if self.is_full else _adapter_parameters(self._adapted, self.config.lora_rank)

    @property
    def _numbers(self) -> int:
        """Of the transformer."""
        return transformer_bytes(self.architecture.transformer, NO_CHANGE, torch.bfloat16).total // 2

    @property
    def trained_bytes(self) -> int:
        """Of those numbers: adapters and masters are fp32."""
        return self.trained * (self.dtype.itemsize if self.is_full and not self.has_masters else 4)

    @property
    def optimizer_bytes(self) -> int:
        """About the size of the optimizer's state."""
        known = known_optimizer(self.config.optimizer)
        if self.is_full:
            return known.state_size(
                weight.shape for weight in empty_transformer(self.architecture.transformer).parameters()
            )
        return round(self.trained * known.state_bytes)

    @property
    def _exported_model_bytes(self) -> int:
        """Size of the transformer that a full run exports."""
        name = self.config.model_save_dtype
        return self.trained * (self.trained_bytes // self.trained if name is None else DTYPES[name].itemsize)

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of one checkpoint."""
        config = self.config
        if self.is_full:
            exported = self._exported_model_bytes
            kept = 0 if exported >= self.trained_bytes else self.trained_bytes
            return checkpoint_bytes(config, exported, kept, self.optimizer_bytes)
        spec = self.architecture.transformer
        exported = _saved_parameters(spec, self._adapted, config.lora_rank) * DTYPES[config.lora_save_dtype].itemsize
        return checkpoint_bytes(config, exported, self.trained_bytes, self.optimizer_bytes)

    def passing(self, size: tuple[int, int], batch: int, references: int = 0) -> Pass:
        """What goes through the transformer in training, with so many reference tokens a sample."""
        config, spec = self.config, self.architecture.transformer
        forced = self.work.forced_share
        routes = [
            replace(route, keep_ratio=max(route.keep_ratio, forced))
            for route in resolve(config.tread_routes, spec.blocks)
        ]
        return Pass(
            spec=spec,
            dtype=self.dtype,
            batch=batch,
            text=self.architecture.text_length,
            image=tokens_of(size),
            is_autocast=config.is_autocast,
            is_full=self.is_full,
            is_released=config.optimizer_release_gradients,
            adapted=() if self.is_full else self._adapted,
            rank=config.lora_rank,
            dropout=config.lora_dropout,
            recomputed=recomputed_blocks(config, spec.blocks),
            routes=tuple(routes),
            references=references,
            reference_attention=config.reference_attention,
        )

    def train(self) -> PhasePlan:
        """Steps at the largest bucket."""
        config = self.config
        room = _Room(self.machine, self.config.ranks_per_machine)
        read = self._hold(room)
        passing = self.passing(self.work.bucket, self.work.batch, self.work.references)
        accumulated = config.gradient_accumulation_steps > 1
        scatters = self.shards_gradients
        collects = scatters or (self.has_masters and self.engine != "zero1")
        worst = training(
            passing,
            offloaded=config.activation_offload,
            accumulated=accumulated and not collects,
            shards=config.ranks if scatters else 1,
        )
        if (
            scatters and not self.is_zero
        ):  # traced in the dtype that the weights compute in, and kept in that of the optimizer
            worst = replace(worst, gradients=worst.gradients * self.trained_bytes // self._computed_bytes)
        # An optimizer's step has all gradients, and no activations any more. Masters collect theirs before it, and
        # keep them through the passes of a step. Released gradients are gone by then: a parameter is stepped beside
        # the activations of the block at work, which has its gradient.
        is_released = config.optimizer_release_gradients
        gradients = 0 if is_released else self._share(self._gradient_bytes, is_sharded=scatters)
        collected = gradients if collects and accumulated else 0
        if self.is_zero:  # the optimizer has those of its share once more, in fp32
            gradients += self._share(self.trained_bytes, is_sharded=True)
        if worst.total + collected >= gradients:
            self._trained_room(room)("gradients", worst.gradients + collected)
            room.device("activations", worst.saved)
            stepping = STEP_BYTES[self._device] if is_released else 0
            room.device("workspace", worst.workspace + self._unpacked + stepping)
        else:
            self._trained_room(room)("gradients", gradients)
        room.device("reduction bucket", self._reduction_bytes)
        room.ram("activations that wait", worst.host_inputs)
        if self.work.draws and not config.offload_during_startup:
            self._hold_autoencoder(room, decoder_shapes(self.architecture.autoencoder))  # from the first picture on
        self._data(room, passing, is_trained=True)
        room.disk("checkpoints", (config.checkpoints_total_limit + 1) * self.checkpoint_bytes)
        if self.is_full:  # in BFL's layout; the diffusers folder is links to the last checkpoint
            room.disk("single file", self._exported_model_bytes * (2 if config.use_ema else 1))
        width, height = self.work.bucket
        beside = f" + {self.work.references} reference tokens" if self.work.references else ""
        return room.plan("train", f"{width}x{height}{beside} × {self.work.batch}{self._residency}", read)

    def draws_both(self, size: tuple[int, int]) -> bool:
        """Whether the two predictions of classifier-free guidance share a pass: on an accelerator, where that takes no
        more than training or an image does anyway. Last bits differ, so this depends on the options and the training
        images, and neither on free memory nor on the number of processes; on a CPU it is never done, as in `sample`.
        """
        if self.machine.accelerator is None or self.has_preview or not self._has_two_predictions:
            return False
        alone = self
        if self.config.ranks > 1:
            alone = replace(self, config=self.config.model_copy(update={"num_processes": 1}))
        both, one = alone._validation(size, 2), alone._validation(size, 1)
        return both.total("accelerator") <= max(one.total("accelerator"), alone.train().total("accelerator"))

    @property
    def _has_two_predictions(self) -> bool:
        config = self.config
        scales = drawing_flavour(config).scales(config.validation_guidance, config.validation_guidance_real)
        return scales.real != 1

    def validation(self, size: tuple[int, int]) -> PhasePlan:
        """A picture of `size` in the middle of training."""
        return self._validation(size, 2 if self.draws_both(size) else 1)

    def _validation(self, size: tuple[int, int], batch: int) -> PhasePlan:
        """As `validation`, with `batch` predictions in a pass."""
        width, height = size
        room = _Room(self.machine, self.config.ranks_per_machine)
        self._hold(room)
        read = self._draw(room, size, batch)
        return room.plan("validation", f"{width}x{height}, {self._passes(batch)}", read)

    @property
    def has_preview(self) -> bool:
        """Whether validation images are drawn on another model."""
        return self.config.validation_preview_model is not None and not self.is_full

    @cached_property
    def base_leaves(self) -> bool:
        """Whether the base, the optimizer's state and the average wait in host memory while the preview model draws,
        since the accelerator has no room for both. Without an accelerator there is no other place.
        """
        there = self.machine.accelerator
        if there is None or not self.has_preview:
            return False
        beside = (self._preview(size, base_leaves=False).total("accelerator") for size in self.config.sizes)
        return max(beside) > bytes_to_fill(there)

    def preview(self, size: tuple[int, int]) -> PhasePlan:
        """A picture of `size` in the middle of training, drawn on `validation_preview_model`."""
        return self._preview(size, base_leaves=self.base_leaves)

    def _preview(self, size: tuple[int, int], *, base_leaves: bool) -> PhasePlan:
        room, held = (
            _Room(self.machine, self.config.ranks_per_machine),
            _Room(self.machine, self.config.ranks_per_machine),
        )
        self._hold(held)
        stays = ("adapters", "slots for blocks")
        for (name, place), bytes_ in held.sizes.items():
            if base_leaves and place == "accelerator" and name not in stays:
                room.ram("base that waits", bytes_)
            else:
                room.add(name, place, bytes_)
        read = self._hold_transformer(room, "preview ") + self._draw(room, size)
        width, height = size
        where = ", base in RAM" if base_leaves else ""
        return room.plan("preview", f"{width}x{height}, {self._passes()}{where}", read)

    def _passes(self, batch: int = 1) -> str:
        """Of a validation image through the transformer, in words."""
        passes = self.config.validation_num_inference_steps * (1 + self._has_two_predictions) // batch
        return f"{passes} passes{' of two' * (batch == 2)}"

    def _draw(self, room: _Room, size: tuple[int, int], batch: int = 1) -> int:
        """What drawing a picture takes beside the transformers, with `batch` predictions in a pass. Returns what is
        read for it.
        """
        config, autoencoder = self.config, self.architecture.autoencoder
        passing = self.passing(size, batch, self.work.drawn_references)
        drawing = sampling(passing) + self._unpacked
        decoding = decoding_bytes(autoencoder, self._seen_pixels(size, 1), self.vae_dtype)
        weights, _ = autoencoder_bytes(decoder_shapes(autoencoder), self.vae_dtype)
        if config.offload_during_startup and drawing >= weights + decoding:
            room.device("activations", drawing)
        else:
            self._hold_autoencoder(room, decoder_shapes(autoencoder))
            room.device("activations", decoding if config.offload_during_startup else max(drawing, decoding))
        # What is trained steps aside for its average, or for what a schedule-free optimizer gives.
        averaged = config.use_ema and config.ema_validation != "none" and not self.has_masters
        asides = int(averaged) + int(known_optimizer(config.optimizer).library == "schedulefree")
        room.device("put aside", asides * self._share(self.trained_bytes, is_sharded=self._shards_state))
        self._data(room, passing)
        return weights

    @property
    def _unpacked(self) -> int:
        """Of the largest quantized matrix while it is multiplied with; packed ones are taken apart in bytes first."""
        if self._precision == NO_CHANGE:
            return self._weights.largest_matrix * self.dtype.itemsize if self._held else 0
        return self._weights.largest_matrix * (self.dtype.itemsize + int(PRECISIONS[self._precision].bits < 8))

    @property
    def _held(self) -> tuple[tuple[str, str], ...]:
        """Linears that stay in their file's precision."""
        return self.architecture.held if self._precision == NO_CHANGE and not self.is_full else ()

    @property
    def _precision(self) -> str:
        """What learns is not quantized."""
        return NO_CHANGE if self.is_full else self.config.base_model_precision

    @property
    def _is_mapped(self) -> bool:
        """Whether the base's weights are parts of the mapped file until they are moved."""
        return self._precision == NO_CHANGE and not self.architecture.is_decoded

    @property
    def _weights(self) -> TransformerBytes:
        spec, ranks = self.architecture.transformer, self.config.ranks
        return transformer_bytes(spec, self._precision, self.dtype, ranks, self._held)

    @property
    def _reduction_bytes(self) -> int:
        """Of the buffer through which processes sum or scatter gradients."""
        if self.engine == "single":
            return 0
        if self.is_zero:
            buckets = 2 if self.engine == "zero2" and self._zero.overlap_comm else 1
            return buckets * self._zero.reduce_bucket_size * self._computed_bytes // self.trained
        if self.is_full and self.is_sharded:
            return max(self._weights.blocks) * 4 // self.dtype.itemsize
        largest = self._weights.largest_matrix * self.trained_bytes // self.trained if self.is_full else 0
        return min(max(BUCKET_BYTES, largest), self.trained_bytes)

    def _hold(self, room: _Room) -> int:
        """All that stays from step to step. Returns what is read for it."""
        config = self.config
        read = self._hold_transformer(room)
        hold = self._trained_room(room)
        if not self.is_full:
            room.device("adapters", self._share(self.trained_bytes, is_sharded=self.shards_trained))
        # ZeRO-1 and ZeRO-2 copy fp32 weights too, ZeRO-3 only to host memory.
        is_alias = self.engine == "zero3" and self._computed_bytes == self.trained_bytes
        if self.has_masters and (not is_alias or config.offloads("offload_optimizer")):
            hold("masters", self._share(self.trained_bytes, is_sharded=self._shards_state))
        hold("optimizer", self._share(self.optimizer_bytes, is_sharded=self._shards_state))
        if config.use_ema:
            average = self._share(4 * self.trained, is_sharded=self._shards_state)
            (room.ram if config.is_average_on_cpu else hold)("average", average)
        return read

    @property
    def _shards_state(self) -> bool:
        """Whether each process holds only its share of the optimizer's state, and of what it steps on and averages."""
        return self.is_zero or self.shards_trained

    def _trained_room(self, room: _Room) -> Callable[[str, int], None]:
        """Where the trainable parameters' masters, gradients and optimizer state are: beside the shards of them, if
        those are in host memory.
        """
        is_offloaded = self.is_full and self.engine == "fsdp2" and self.config.fsdp_cpu_offload
        return room.ram if is_offloaded or (self.is_zero and self.config.offloads("offload_optimizer")) else room.device

    def _hold_transformer(self, room: _Room, prefix: str = "") -> int:
        """A transformer's weights; `prefix` stands before their names. Returns what is read for them."""
        config, weights = self.config, self._weights
        if self.is_sharded:
            self._hold_shards(room, prefix)
        elif self.is_full or not config.enable_group_offload:
            room.device(f"{prefix}weights", weights.total)
        else:
            blocks = self._streaming
            room.device(f"{prefix}weights", weights.rest)
            room.device(f"{prefix}resident blocks", blocks.resident)
            room.device(f"{prefix}slots for blocks", blocks.slots)
            if config.group_offload_to_disk_path is None:
                room.ram(f"{prefix}blocks that wait", blocks.streamed)
            else:
                # Those that are no part of the mapped file are all in memory once, before they are written.
                room.ram(f"{prefix}blocks that wait", 0 if self._is_mapped else blocks.streamed)
                room.ram(f"{prefix}read buffers", blocks.read_buffers)
                room.disk(f"{prefix}blocks that wait", blocks.streamed)
        return transformer_bytes(self.architecture.transformer, NO_CHANGE, torch.bfloat16).total

    def _hold_shards(self, room: _Room, prefix: str) -> None:
        """A sharded transformer: this process's share of each weight, and the weights that are whole at a time. FSDP2:
        those outside the blocks and those of one or all blocks. ZeRO-3: as many as its settings allow, and the layer
        at work.
        """
        config, weights = self.config, self._weights
        is_offloaded = config.offloads("offload_param") if self.is_zero else config.fsdp_cpu_offload
        if self.is_zero or not self.has_masters:  # which are FSDP2's shards themselves
            (room.ram if is_offloaded else room.device)(f"{prefix}shards of weights", weights.shards)
        if self.is_zero:
            live = self._zero.stage3_max_live_parameters + self._zero.stage3_prefetch_bucket_size
            gathered = min(weights.total, live * weights.total // self._numbers + max(weights.largest_layers))
            if not self._is_mapped:
                room.ram(f"{prefix}weights while they are loaded", weights.total)
        else:
            blocks = sorted(weights.blocks)[-GATHERED_BLOCKS if config.fsdp_reshard_after_forward else 0 :]
            gathered = weights.rest + sum(blocks)
        room.device(f"{prefix}gathered weights", gathered)

    def _data(self, room: _Room, passing: Pass, *, is_trained: bool = False) -> None:
        """Latents, their noise, their mixture, the velocity and the answer, fp32; references; contexts; tables of
        positions, with references one a sample. In training the base model's prediction and a second prompt's contexts,
        where the options ask for them. In host memory this batch and the next.
        """
        spec, batch = passing.spec, passing.batch
        latents, references = (batch * count * spec.in_channels * 4 for count in (passing.image, passing.references))
        contexts = batch * passing.text * self._context_row
        tables = (batch if references else 1) * passing.joint * spec.head_dim * 4
        if is_trained and self.config.preserves:
            contexts *= 2
        has_base = is_trained and (self.config.preserves or self.config.masked_loss_prior > 0)
        room.device("batch", (6 if has_base else 5) * latents + references + contexts + tables)
        if self.machine.accelerator is not None:
            room.ram("batch", 2 * (latents + references + contexts))


def _settled(config: RunConfig, resident: int, *, ahead: bool) -> RunConfig:
    choices = {"group_offload_resident_blocks": str(resident), "group_offload_use_stream": str(ahead).lower()}
    return config.model_copy(update=choices)


def _weight(phase: PhasePlan) -> int:
    return phase.total("accelerator") or phase.total("ram")
