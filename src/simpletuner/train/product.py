"""The trainable parameters of each `model_type` and the files that a run exports: a LoRA, or a whole model."""

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
from simpletuner.flux2.lora_formats import lost_layer_messages
from simpletuner.flux2.modelfile import (
    TRANSFORMER_FOLDER,
    read_transformer,
    save_transformer,
    save_transformer_shares,
)
from simpletuner.flux2.source import Source
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.precision import DTYPES, QuantizedLinear
from simpletuner.memory.shard import Sharding, local_bytes
from simpletuner.memory.shares import RankTensor
from simpletuner.memory.world import World
from simpletuner.memory.zero import ZeroShards, engine_settings, landing_device
from simpletuner.runs.layout import LORA_NAME, RunDirectory
from simpletuner.train import optim
from simpletuner.train.report import Reporter
from simpletuner.train.trained import Trainable


@runtime_checkable
class Product(Protocol):
    """A model with its trainable parameters, and the export of them."""

    @property
    def transformer(self) -> Flux2Transformer:
        """The model that is trained."""

    @property
    def trained(self) -> Trainable:
        """Its trainable parameters."""

    @property
    def noun(self) -> str:
        """The word for the export in messages: "LoRA" or "model"."""

    @property
    def checkpoint_bytes(self) -> int:
        """Estimated bytes of a checkpoint."""

    @property
    def single_file_bytes(self) -> int:
        """Bytes on disk that a finished run takes in addition to its last checkpoint."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""

    def report_parameters(self, run: RunDirectory, reporter: Reporter) -> None:
        """Report the trainable parameters, and write them into the run directory."""

    def save(
        self, folder: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], world: World
    ) -> dict[str, str]:
        """Export `state`, the trained tensors or their average, into `folder`, a checkpoint. All ranks call it, each
        with its own tensors. Returns the SHA-256 of each file that was already verified by reading it back, by name in
        `folder`.

        Raises:
            DiskError: no space, or a file reads back differently.
        """

    def export_is_exact(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the export of `state` keeps every bit, so that `read_export` returns `state`."""

    def read_export(self, folder: Path) -> dict[str, Tensor]:
        """The tensors that `save` wrote into `folder`, where `export_is_exact`.

        Raises:
            CheckpointError: the files cannot be read.
        """


@dataclass(frozen=True)
class LoraProduct:
    """A LoRA on a frozen transformer, exported as one file."""

    config: RunConfig
    transformer: Flux2Transformer
    trained: Adapter
    noun: str = "LoRA"

    @classmethod
    def load(cls, config: RunConfig, source: Source, world: World, reporter: Reporter) -> "LoraProduct":
        """Load the frozen transformer, sharded if configured, with a fresh adapter or that of `init_lora`."""
        sharding = Sharding.of(config, world)
        device = landing_device(config, world)
        transformer = load_base(config, config, source, device, report=reporter.notice, sharding=sharding)
        base_bytes = sum(tensor.nbytes for tensor in transformer.parameters())
        precisions = sorted(
            {each.layout.precision for each in transformer.modules() if isinstance(each, QuantizedLinear)}
        )
        if precisions:
            origin = ", as stored in its file," if config.base_model_precision == NO_CHANGE else ""
            reporter.say(f"The base in {' and '.join(precisions)}{origin} takes {format_size(base_bytes)}.")
        if sharding is not None:
            shard_bytes = local_bytes(transformer.parameters())
            reporter.say(
                f"Sharded: each of {world.size} processes holds {format_size(shard_bytes)} of "
                f"{format_size(base_bytes)}."
            )
        transformer.requires_grad_(False)
        if config.init_lora is None:
            adapter = attach(transformer, config, seed=config.seed)
        else:
            saved = read_lora(Path(config.init_lora))
            if saved.unused:
                reporter.notice(
                    f"{saved.path.name} also has {saved.unused} keys for text encoder layers. They are not used: "
                    "only the transformer has an adapter here."
                )
            adapter = attach_saved(transformer, saved, dropout=config.lora_dropout)
        if sharding is not None:
            adapter.to(world.device)  # `attach` uses the shards' device, which may be host memory
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
        return 0  # negligible for a LoRA

    def groups(self) -> list[dict[str, Any]]:
        return optim.lora_plus(self.trained.named_parameters(), self.config.lora_plus_ratio)

    def report_parameters(self, run: RunDirectory, reporter: Reporter) -> None:
        audit = self.trained.audit()
        reporter.say(
            f"LoRA on {audit['layers']} layers ({audit['target']}): {audit['parameters']:,} trainable parameters, "
            f"{format_size(audit['bytes'])} in fp32"
        )
        for kind in audit["kinds"]:
            rows, columns = kind["rows"], kind["columns"]
            reporter.detail(
                f"  {kind['layers']} × {kind['name']}: rank {kind['rank']}, rows {rows[0]}–{rows[1]}, "
                f"columns {columns[0]}–{columns[1]}, {kind['parameters']:,} parameters"
            )
        for text in lost_layer_messages(self.trained.layers, self.config.lora_format).values():
            reporter.notice(text)
        write_json(run.root / "adapter.json", audit)

    def save(
        self, folder: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], world: World
    ) -> dict[str, str]:
        shards = self.trained.shards
        gathered = state if shards is None else shards.whole_tensors(state, to=0)
        if world.is_main:
            assert gathered is not None
            dtype = DTYPES[self.config.lora_save_dtype]
            folder.mkdir(exist_ok=True)
            with self.trained.with_export_weights(gathered):
                save_lora(folder / LORA_NAME, self.trained, metadata=metadata, dtype=dtype)
        return {}

    def export_is_exact(self, state: Mapping[str, Tensor]) -> bool:  # noqa: ARG002  the same for every state
        """False: the export expands a LoRA to full matrices, with its scale folded in."""
        return False

    def read_export(self, folder: Path) -> dict[str, Tensor]:  # noqa: ARG002  as above
        return {}


@dataclass(frozen=True)
class FullProduct:
    """A transformer with all weights trainable, exported as a diffusers folder and a single file in BFL's layout."""

    config: RunConfig
    transformer: Flux2Transformer
    trained: FullModel
    noun: str = "model"

    @classmethod
    def load(cls, config: RunConfig, source: Source, world: World, _reporter: Reporter) -> "FullProduct":
        """Load the transformer with all weights trainable: in fp32, in bf16 with fp32 masters, or in bf16 alone. It is
        sharded if configured.
        """
        compute_dtype = DTYPES[config.base_dtype]
        has_masters = config.has_masters and not (config.zero_stage and world.size > 1)  # DeepSpeed makes its own
        dtype = torch.float32 if has_masters else compute_dtype
        sharding = Sharding.of(config, world)
        if sharding is None:
            transformer = load_transformer(source, dtype, landing_device(config, world), is_plain=True)
            return cls(config, transformer, unfreeze(transformer, compute_dtype if has_masters else None))
        mixed_sharding = replace(sharding, gather_dtype=compute_dtype)
        transformer = load_transformer(source, dtype, world.device, sharding=mixed_sharding, is_plain=True)
        return cls(config, transformer, unfreeze_sharded(transformer, compute_dtype, world))

    @property
    def save_dtype(self) -> torch.dtype:
        """Dtype of the exported transformer."""
        if self.config.model_save_dtype is not None:
            return DTYPES[self.config.model_save_dtype]
        return self.trained.parameters()[0].dtype

    @property
    def checkpoint_bytes(self) -> int:
        count = self.trained.parameter_count
        exact_bytes = count * self.trained.parameters()[0].itemsize
        extra_bytes = 0 if self.export_is_exact(self.trained.state()) else exact_bytes
        return checkpoint_bytes(self.config, count * self.save_dtype.itemsize, extra_bytes, self.optimizer_bytes)

    @property
    def single_file_bytes(self) -> int:
        return self.trained.parameter_count * self.save_dtype.itemsize * (2 if self.config.use_ema else 1)

    @property
    def optimizer_bytes(self) -> int:
        """Estimated bytes of the optimizer state."""
        return known_optimizer(self.config.optimizer).state_size(self.trained.whole_shapes)

    def groups(self) -> list[dict[str, Any]]:
        return optim.by_role(*self.trained.by_role())

    def report_parameters(self, run: RunDirectory, reporter: Reporter) -> None:
        audit = self.trained.audit()
        masters = f", {format_size(audit['master_bytes'])} of fp32 masters" if audit["master_bytes"] else ""
        if self.config.optimizer_release_gradients:
            largest = max(weight.nbytes for weight in self.trained.parameters())
            gradients = f"at most {format_size(largest)}"
        else:
            gradients = format_size(audit["master_bytes"] or audit["weight_bytes"])
        reporter.say(
            f"The whole transformer: {audit['parameters']:,} trainable parameters in {audit['tensors']} tensors; "
            f"{format_size(audit['weight_bytes'])} of {audit['dtype']} weights{masters}, {gradients} of "
            f"gradients, about {format_size(self.optimizer_bytes)} of {self.config.optimizer} state"
        )
        if self.trained.shards is not None:
            ranks, shard_bytes = self.trained.shards.world.size, sum(rows.nbytes for rows in self.trained.parameters())
            reporter.say(
                f"Sharded: each of {ranks} processes holds {format_size(shard_bytes)} of the weights, and the same "
                "share of gradients and optimizer state."
            )
        for kind in audit["kinds"]:
            reporter.detail(f"  {kind['tensors']} × {kind['name']}: {kind['parameters']:,} parameters")
        write_json(run.root / "weights.json", audit)

    def save(
        self, folder: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], world: World
    ) -> dict[str, str]:
        target, spec, dtype = folder / TRANSFORMER_FOLDER, self.transformer.spec, self.save_dtype
        if world.is_alone:
            save_transformer(target, spec, state, metadata=metadata, dtype=dtype)
            return {}
        splits = {} if self.trained.shards is None else self.trained.shards.splits
        rank_tensors = {name: RankTensor(tensor, splits.get(name)) for name, tensor in state.items()}
        hashes = save_transformer_shares(target, spec, rank_tensors, world, metadata=metadata, dtype=dtype)
        return {f"{TRANSFORMER_FOLDER}/{name}": digest for name, digest in hashes.items()}

    def export_is_exact(self, state: Mapping[str, Tensor]) -> bool:
        dtype = self.save_dtype
        return all(dtype in (tensor.dtype, torch.float32) for tensor in state.values())

    def read_export(self, folder: Path) -> dict[str, Tensor]:
        return read_transformer(folder / TRANSFORMER_FOLDER)


def zero_shards(config: RunConfig, product: Product, world: World) -> ZeroShards | None:
    """DeepSpeed's shards of the trainable parameters of `product`; None without `deepspeed_config`."""
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
"""By `model_type`: loads the transformer and makes the trainable parameters."""
