"""What each `model_type` trains, and the files that come of it: an adapter, or a whole model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from simpletuner.base.files import write_json
from simpletuner.base.sizes import format_size
from simpletuner.config.optimizers import known_optimizer
from simpletuner.config.precisions import NO_CHANGE
from simpletuner.config.run import RunConfig
from simpletuner.flux2.components import load_base
from simpletuner.flux2.export import attach_saved, read_lora, save_lora
from simpletuner.flux2.footprint import checkpoint_bytes
from simpletuner.flux2.full import FullModel, unfreeze, unfreeze_sharded
from simpletuner.flux2.load import load_transformer
from simpletuner.flux2.lora import Adapter, attach
from simpletuner.flux2.lora_formats import loss_texts
from simpletuner.flux2.modelfile import (
    TRANSFORMER_FOLDER,
    read_transformer,
    save_transformer,
    save_transformer_shares,
)
from simpletuner.flux2.source import Source
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.precision import DTYPES, QuantizedLinear
from simpletuner.memory.shard import Sharding, held_bytes
from simpletuner.memory.shares import RankTensor
from simpletuner.memory.world import World
from simpletuner.memory.zero import ZeroShards, engine_settings, landing_device
from simpletuner.runs.layout import LORA_NAME, RunDirectory
from simpletuner.train import optim
from simpletuner.train.report import Reporter
from simpletuner.train.trained import Trained


@runtime_checkable
class Product(Protocol):
    """What a run trains, and what comes of it."""

    @property
    def transformer(self) -> Flux2Transformer:
        """The model that computes."""

    @property
    def trained(self) -> Trained:
        """What of it learns."""

    @property
    def noun(self) -> str:
        """What people call it."""

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint."""

    @property
    def single_file_bytes(self) -> int:
        """Disk space that the finished run takes beside its last checkpoint."""

    def groups(self) -> list[dict[str, Any]]:
        """What the optimizer steps on, in groups."""

    def introduce(self, run: RunDirectory, reporter: Reporter) -> None:
        """Say what learns, and write it into the run."""

    def save(
        self, folder: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], world: World
    ) -> dict[str, str]:
        """Write an export of `state`, the trained tensors or their average, into `folder`, a checkpoint. All ranks call
        it, each with what it holds. Returns the SHA-256 of files that are read back already, by name in `folder`.

        Raises:
            DiskError: no space, or a file reads back differently.
        """

    def holds(self, state: Mapping[str, Tensor]) -> bool:
        """Whether that export has the very numbers of `state`, so that they can be read back from it."""

    def saved(self, folder: Path) -> dict[str, Tensor]:
        """What `save` wrote into `folder`, where it `holds` it.

        Raises:
            CheckpointError: it cannot be read.
        """


@dataclass(frozen=True)
class LoraProduct:
    """Small matrices beside a frozen transformer; a file of them."""

    config: RunConfig
    transformer: Flux2Transformer
    trained: Adapter
    noun: str = "LoRA"

    @classmethod
    def load(cls, config: RunConfig, source: Source, world: World, reporter: Reporter) -> "LoraProduct":
        """The transformer, frozen, sharded if asked to, with a fresh adapter, or the one of `init_lora`."""
        sharding = Sharding.of(config, world)
        device = landing_device(config, world)
        transformer = load_base(config, config, source, device, report=reporter.notice, sharding=sharding)
        whole = sum(tensor.nbytes for tensor in transformer.parameters())
        held = sorted({each.layout.precision for each in transformer.modules() if isinstance(each, QuantizedLinear)})
        if held:
            kept = ", as its file holds it," if config.base_model_precision == NO_CHANGE else ""
            reporter.say(f"The base in {' and '.join(held)}{kept} takes {format_size(whole)}.")
        if sharding is not None:
            own = held_bytes(transformer.parameters())
            reporter.say(f"Sharded: each of {world.size} processes holds {format_size(own)} of {format_size(whole)}.")
        transformer.requires_grad_(False)
        if config.init_lora is None:
            adapter = attach(transformer, config, seed=config.seed)
        else:
            saved = read_lora(Path(config.init_lora))
            if saved.unused:
                reporter.notice(
                    f"{saved.path.name} holds {saved.unused} keys of a text encoder's layers too. They are not used: "
                    "the text encoder is not adapted here."
                )
            adapter = attach_saved(transformer, saved, dropout=config.lora_dropout)
        if sharding is not None:
            adapter.to(world.device)  # attached where the shards lie, which may be host memory
        return cls(config, transformer, adapter)

    @property
    def checkpoint_bytes(self) -> int:
        saved = sum(layer.rank * (layer.in_features + layer.out_features) for layer in self.trained.layers.values())
        saved *= DTYPES[self.config.lora_save_dtype].itemsize
        count = self.trained.parameter_count
        state = round(count * known_optimizer(self.config.optimizer).state_bytes)
        return checkpoint_bytes(self.config, saved, count * 4, state)

    @property
    def single_file_bytes(self) -> int:
        return 0  # a copy of a LoRA is small

    def groups(self) -> list[dict[str, Any]]:
        return optim.lora_plus(self.trained.named_parameters(), self.config.lora_plus_ratio)

    def introduce(self, run: RunDirectory, reporter: Reporter) -> None:
        audit = self.trained.audit()
        reporter.say(
            f"LoRA on {audit['layers']} layers ({audit['target']}): {audit['parameters']:,} trained parameters, "
            f"{format_size(audit['bytes'])} in fp32"
        )
        for kind in audit["kinds"]:
            rows, columns = kind["rows"], kind["columns"]
            reporter.detail(
                f"  {kind['layers']} × {kind['name']}: rank {kind['rank']}, rows {rows[0]}–{rows[1]}, "
                f"columns {columns[0]}–{columns[1]}, {kind['parameters']:,} parameters"
            )
        for text in loss_texts(self.trained.layers, self.config.lora_format).values():
            reporter.notice(text)
        write_json(run.root / "adapter.json", audit)

    def save(
        self, folder: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], world: World
    ) -> dict[str, str]:
        shards = self.trained.shards
        whole = state if shards is None else shards.wholes(state, to=0)
        if world.is_main:
            assert whole is not None
            dtype = DTYPES[self.config.lora_save_dtype]
            folder.mkdir(exist_ok=True)
            with self.trained.showing(whole):
                save_lora(folder / LORA_NAME, self.trained, metadata=metadata, dtype=dtype)
        return {}

    def holds(self, state: Mapping[str, Tensor]) -> bool:  # noqa: ARG002  whatever it is
        """Never: it is expanded to full matrices, with its scale folded in."""
        return False

    def saved(self, folder: Path) -> dict[str, Tensor]:  # noqa: ARG002  as above
        return {}


@dataclass(frozen=True)
class FullProduct:
    """Every weight of a transformer; a diffusers folder, and a single file in BFL's layout."""

    config: RunConfig
    transformer: Flux2Transformer
    trained: FullModel
    noun: str = "model"

    @classmethod
    def load(cls, config: RunConfig, source: Source, world: World, _reporter: Reporter) -> "FullProduct":
        """The transformer, all of its weights trained: in fp32, or as bf16 with fp32 masters, or as bf16 alone; sharded
        if asked to.
        """
        computes_in = DTYPES[config.base_dtype]
        has_masters = config.has_masters and not (config.zero_stage and world.size > 1)  # DeepSpeed has its own
        dtype = torch.float32 if has_masters else computes_in
        sharding = Sharding.of(config, world)
        if sharding is None:
            transformer = load_transformer(source, dtype, landing_device(config, world), is_plain=True)
            return cls(config, transformer, unfreeze(transformer, computes_in if has_masters else None))
        trained = replace(sharding, trained_as=computes_in)
        transformer = load_transformer(source, dtype, world.device, sharding=trained, is_plain=True)
        return cls(config, transformer, unfreeze_sharded(transformer, computes_in, world))

    @property
    def save_dtype(self) -> torch.dtype:
        """Of the exported transformer."""
        if self.config.model_save_dtype is not None:
            return DTYPES[self.config.model_save_dtype]
        return self.trained.parameters()[0].dtype

    @property
    def checkpoint_bytes(self) -> int:
        count = self.trained.parameter_count
        own = count * self.trained.parameters()[0].itemsize
        kept = 0 if self.holds(self.trained.state()) else own
        return checkpoint_bytes(self.config, count * self.save_dtype.itemsize, kept, self.optimizer_bytes)

    @property
    def single_file_bytes(self) -> int:
        return self.trained.parameter_count * self.save_dtype.itemsize * (2 if self.config.use_ema else 1)

    @property
    def optimizer_bytes(self) -> int:
        """About the size of the optimizer's state."""
        return known_optimizer(self.config.optimizer).state_size(self.trained.whole_shapes)

    def groups(self) -> list[dict[str, Any]]:
        return optim.by_role(*self.trained.by_role())

    def introduce(self, run: RunDirectory, reporter: Reporter) -> None:
        audit = self.trained.audit()
        masters = f", {format_size(audit['master_bytes'])} of fp32 masters" if audit["master_bytes"] else ""
        if self.config.optimizer_release_gradients:
            largest = max(weight.nbytes for weight in self.trained.parameters())
            gradients = f"at most {format_size(largest)}"
        else:
            gradients = format_size(audit["master_bytes"] or audit["weight_bytes"])
        reporter.say(
            f"The whole transformer: {audit['parameters']:,} trained parameters in {audit['tensors']} tensors; "
            f"{format_size(audit['weight_bytes'])} of {audit['dtype']} weights{masters}, {gradients} of "
            f"gradients, about {format_size(self.optimizer_bytes)} of {self.config.optimizer}'s state"
        )
        if self.trained.shards is not None:
            ranks, held = self.trained.shards.world.size, sum(rows.nbytes for rows in self.trained.parameters())
            reporter.say(
                f"Sharded: each of {ranks} processes holds {format_size(held)} of the weights, and the same share of "
                "gradients and optimizer state."
            )
        for kind in audit["kinds"]:
            reporter.detail(f"  {kind['tensors']} × {kind['name']}: {kind['parameters']:,} parameters")
        write_json(run.root / "weights.json", audit)

    def save(
        self, folder: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], world: World
    ) -> dict[str, str]:
        where, spec, dtype = folder / TRANSFORMER_FOLDER, self.transformer.spec, self.save_dtype
        if world.is_alone:
            save_transformer(where, spec, state, metadata=metadata, dtype=dtype)
            return {}
        splits = {} if self.trained.shards is None else self.trained.shards.splits
        shared = {name: RankTensor(tensor, splits.get(name)) for name, tensor in state.items()}
        hashes = save_transformer_shares(where, spec, shared, world, metadata=metadata, dtype=dtype)
        return {f"{TRANSFORMER_FOLDER}/{name}": digest for name, digest in hashes.items()}

    def holds(self, state: Mapping[str, Tensor]) -> bool:
        dtype = self.save_dtype
        return all(dtype in (tensor.dtype, torch.float32) for tensor in state.values())

    def saved(self, folder: Path) -> dict[str, Tensor]:
        return read_transformer(folder / TRANSFORMER_FOLDER)


def zero_shards(config: RunConfig, product: Product, world: World) -> ZeroShards | None:
    """What `product` trains, given to DeepSpeed; None without `deepspeed_config`."""
    if not config.zero_stage:
        return None
    weights = product.trained.weights
    dtype = next(iter(weights.values())).dtype
    settings = engine_settings(config.zero_optimization, dtype, config.train_batch_size)
    return ZeroShards(product.transformer, weights, settings, world)


PRODUCTS: dict[str, Callable[[RunConfig, Source, World, Reporter], Product]] = {
    "lora": LoraProduct.load,
    "full": FullProduct.load,
}
"""By `model_type`: loads the transformer and makes of it what is to learn."""
