"""Low-rank adapters: small trainable matrices that modify frozen Linears.

`attach` wraps the target Linears of a transformer and returns the `Adapter`, which holds all trainable parameters. A
single block fuses its Linears: one matrix computes q, k, v and the feed-forward input, another takes the outputs of
attention and feed-forward. A preset that targets one part of a fused matrix trains only its rows or columns.
"""

import contextlib
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from simpletuner.base.draws import draw_seed
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flux2.learning import TrainableParameters
from simpletuner.memory.precision import QuantizedLinear

DOUBLE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE_OUT = ("attn.to_out.0", "attn.to_add_out")
DOUBLE_MLP = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
FUSED_IN = "attn.to_qkv_mlp_proj"
FUSED_OUT = "attn.to_out"
BLOCK_ENDS = ("ff.linear_out", FUSED_OUT)
"""The last Linear of each kind of block. No other module reads its input."""

FusedPart = Literal["whole", "attention", "mlp"]


@dataclass(frozen=True)
class TargetPreset:
    """Target Linears by name in a double block, and the adapted parts of a single block's two Linears."""

    double: tuple[str, ...]
    fused_in: FusedPart | None
    fused_out: FusedPart | None


PRESETS: dict[str, TargetPreset] = {
    "all": TargetPreset(DOUBLE_QKV + DOUBLE_OUT + DOUBLE_MLP, fused_in="whole", fused_out="whole"),
    "attention": TargetPreset(DOUBLE_QKV + DOUBLE_OUT, fused_in="attention", fused_out="attention"),
    "mlp": TargetPreset(DOUBLE_MLP, fused_in="mlp", fused_out="mlp"),
    "tiny": TargetPreset(DOUBLE_QKV, fused_in="attention", fused_out=None),
}

CUSTOM = "custom"
"""Name of a target that is a list or a pattern instead of a preset."""


class _AddToRows(torch.autograd.Function):
    """`out[..., start : start + width] += delta` without a copy of the wide `out`, in forward and in backward.

    The other rows keep their exact bits. Adding zeros would not guarantee that: -0.0 + 0.0 is 0.0.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, delta: Tensor, start: int) -> Tensor:
        ctx.rows = start, start + delta.shape[-1]
        out[..., start : start + delta.shape[-1]].add_(delta)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        start, stop = ctx.rows
        return gradient, gradient[..., start:stop], None


class AdapterLayer(nn.Module):
    """A frozen Linear `base` with `scale · ΔW · x` added to its output.

    `base` may itself be an `AdapterLayer`; then both deltas are added.

    While `is_enabled` is False, the output is that of `base`, bit for bit.
    """

    in_features: int
    out_features: int

    def __init__(self, base: "Adaptable", scale: float) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale = scale
        self.is_enabled = True


class LoraLinear(AdapterLayer):
    """A frozen Linear plus `scale · b · a` on a range of its columns (inputs) and rows (outputs).

    `a` (rank × adapted columns) and `b` (adapted rows × rank) are fp32; forward casts them to the dtype of the input.
    """

    a: nn.Parameter
    b: nn.Parameter

    def __init__(
        self,
        base: "Adaptable",
        a: Float[Tensor, "rank live_in"],
        b: Float[Tensor, "live_out rank"],
        *,
        scale: float,
        dropout: float = 0.0,
        column_start: int = 0,
        row_start: int = 0,
        base_last: bool = False,
    ) -> None:
        super().__init__(base, scale)
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.rank = a.shape[0]
        self.dropout = dropout
        self.column_start, self.column_stop = column_start, column_start + a.shape[1]
        self.row_start, self.row_stop = row_start, row_start + b.shape[0]
        self.base_last = base_last
        """Whether the base product is computed after the adapter's products. The order decides in which order autograd
        sums the gradients of the input, and so the last bits of that sum if more than one Linear reads that input.
        """
        self.train(base.training)

    @property
    def adapted_range(self) -> "LinearRange":
        """The adapted rows and columns."""
        return LinearRange((self.row_start, self.row_stop), (self.column_start, self.column_stop))

    @property
    def has_all_columns(self) -> bool:
        return self.column_stop - self.column_start == self.in_features

    @property
    def has_all_rows(self) -> bool:
        return self.row_stop - self.row_start == self.out_features

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        return self.deferred(x)()

    def deferred(self, x: Float[Tensor, "*batch columns"]) -> Callable[[], Float[Tensor, "*batch rows"]]:
        """Return a function that returns `self(x)`.

        With `base_last`, the adapter's products are computed now and the base product in that function. Without it,
        everything is computed now; if the adapter is disabled, everything in that function.
        """
        if not self.is_enabled:
            return lambda: self.base(x)
        if self.base_last:
            delta = self._delta(x)
            return lambda: self._sum(self.base(x), delta)
        out = self._sum(self.base(x), self._delta(x))
        return lambda: out

    def _delta(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch live_out"]:
        if not self.has_all_columns:
            x = x[..., self.column_start : self.column_stop]
        if self.training and self.dropout > 0:
            x = F.dropout(x, self.dropout)
        return F.linear(F.linear(x, self.a.to(x.dtype)) * self.scale, self.b.to(x.dtype))

    def _sum(self, out: Float[Tensor, "*batch rows"], delta: Float[Tensor, "*batch live_out"]) -> Tensor:
        if self.has_all_rows:
            return out + delta
        added: Tensor = _AddToRows.apply(out, delta, self.row_start)  # type: ignore[no-untyped-call]
        return added

    @torch.no_grad()
    def expanded(self) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rows rank"]]:
        """`a` and `b` at full size on the CPU: exact zeros outside the adapted range, `scale` folded into `b`."""
        a = torch.zeros(self.rank, self.in_features)
        a[:, self.column_start : self.column_stop] = self.a
        b = torch.zeros(self.out_features, self.rank)
        b[self.row_start : self.row_stop] = self.b * self.scale
        return a, b


Adaptable = nn.Linear | QuantizedLinear | AdapterLayer
"""Modules that an adapter can wrap."""


class AdapterKind(TypedDict):
    """The adapted Linears that have the same name in their blocks."""

    name: str
    layers: int
    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    parameters: int


class AdapterAudit(TypedDict):
    """Summary of an attached adapter, for reports and JSON. `bytes` is the size of the trainable fp32 parameters."""

    target: str
    layers: int
    parameters: int
    bytes: int
    kinds: list[AdapterKind]


class Adapter(TrainableParameters):
    """The attached layers by name, in the order of the transformer. They hold all trainable parameters."""

    foreign_state = "adapter state of other layers"

    def __init__(self, layers: Mapping[str, LoraLinear], *, target: str, alpha: float) -> None:
        self.layers = dict(layers)
        self.target = target
        """A key of `PRESETS`, or "custom"."""
        self.alpha = alpha
        """The user's alpha. A new layer's `scale` is alpha/rank; that of a loaded layer may differ."""
        self.masters = None  # adapters are already fp32

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Each trainable tensor, as "<layer>.a" or "<layer>.b"."""
        pairs = {name: (layer.a, layer.b) for name, layer in self.layers.items()}
        return {
            f"{name}.{matrix}": each for name, pair in pairs.items() for matrix, each in zip("ab", pair, strict=True)
        }

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapter off inside the context: outputs and cost are exactly those of the base model.

        Use it without gradients only: backward would recompute checkpointed blocks after the context has switched the
        adapter on again.
        """
        previous_flags = [layer.is_enabled for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.is_enabled = False
        try:
            yield
        finally:
            for layer, was_enabled in zip(self.layers.values(), previous_flags, strict=True):
                layer.is_enabled = was_enabled

    @contextlib.contextmanager
    def with_export_weights(self, whole_tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let `weights` hold `whole_tensors`, which are not sharded, inside the context, so that they can be exported.

        Tensors on the right device are not copied. The model cannot run inside the context.
        """
        shards = {name: weight.data for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.data = whole_tensors[name].to(weight.device)  # another device would drop its gradient hooks
        try:
            yield
        finally:
            for name, weight in self.weights.items():
                weight.data = shards[name]

    def expanded(self) -> dict[str, Float[Tensor, "_ _"]]:
        """An ordinary LoRA under diffusers' names: full size, fp32, on the CPU, alpha/rank folded into B."""
        tensors = {}
        for name, layer in self.layers.items():
            a, b = layer.expanded()
            tensors[f"transformer.{name}.lora_A.weight"] = a
            tensors[f"transformer.{name}.lora_B.weight"] = b
        return tensors

    def audit(self) -> AdapterAudit:
        """Count the trainable parameters, from the layers themselves."""
        groups: dict[str, list[LoraLinear]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(layer)
        kinds = [
            AdapterKind(
                name=name,
                layers=len(layers),
                rank=layers[0].rank,
                rows=(layers[0].row_start, layers[0].row_stop),
                columns=(layers[0].column_start, layers[0].column_stop),
                parameters=sum(layer.a.numel() + layer.b.numel() for layer in layers),
            )
            for name, layers in groups.items()
        ]
        return AdapterAudit(
            target=self.target,
            layers=len(self.layers),
            parameters=self.parameter_count,
            bytes=sum(parameter.numel() * parameter.element_size() for parameter in self.parameters()),
            kinds=kinds,
        )


@dataclass(frozen=True)
class LinearRange:
    """The adapted rows and columns of one Linear, each as (start, stop)."""

    rows: tuple[int, int]
    columns: tuple[int, int]


def linears(transformer: nn.Module) -> dict[str, Adaptable]:
    """Every Linear of `transformer` by name. An adapted Linear appears once, as its adapter layer."""
    by_name: dict[str, Adaptable] = {}
    for name, module in transformer.named_modules():
        inside = isinstance(transformer.get_submodule(name.rpartition(".")[0]), AdapterLayer)
        if isinstance(module, Adaptable) and not inside:
            by_name[name] = module
    return by_name


def full_range(linear: Adaptable) -> LinearRange:
    """All rows and columns of `linear`."""
    return LinearRange(rows=(0, linear.out_features), columns=(0, linear.in_features))


def preset_ranges(transformer: nn.Module, preset: TargetPreset) -> dict[str, LinearRange]:
    """The rows and columns that `preset` adapts, by Linear, in the order of `transformer`.

    Raises:
        ConfigError: an entry of the preset names a Linear that no block has.
    """
    ranges: dict[str, LinearRange] = {}
    missing = {
        *preset.double,
        *([FUSED_IN] if preset.fused_in else []),
        *([FUSED_OUT] if preset.fused_out else []),
    }
    for name, linear in linears(transformer).items():
        blocks, _, numbered = name.partition(".")
        inner_name = numbered.partition(".")[2]
        rows, columns = full_range(linear).rows, full_range(linear).columns
        if blocks == "transformer_blocks" and inner_name in preset.double:
            pass
        elif blocks == "single_transformer_blocks" and inner_name == FUSED_IN and preset.fused_in:
            rows = _part_range(preset.fused_in, attention_end=3 * linear.in_features, end=linear.out_features)
        elif blocks == "single_transformer_blocks" and inner_name == FUSED_OUT and preset.fused_out:
            columns = _part_range(preset.fused_out, attention_end=linear.out_features, end=linear.in_features)
        else:
            continue
        ranges[name] = LinearRange(rows, columns)
        missing.discard(inner_name)
    ConfigError.raise_if(
        Problem(f"the LoRA preset targets {inner_name}", "a model whose blocks have it")
        for inner_name in sorted(missing)
    )
    return ranges


def _part_range(part: FusedPart, *, attention_end: int, end: int) -> tuple[int, int]:
    """The range of `part`: both fused matrices hold attention first, then the feed-forward."""
    return {"whole": (0, end), "attention": (0, attention_end), "mlp": (attention_end, end)}[part]


def pattern_ranges(transformer: nn.Module, targets: str | tuple[str, ...]) -> dict[str, LinearRange]:
    """The Linears that `targets` matches: full names or endings after a dot, or one regular expression for full names.

    Raises:
        ConfigError: an entry or the expression matches no Linear.
    """
    candidates = linears(transformer)
    if isinstance(targets, str):
        chosen = {name for name in candidates if re.fullmatch(targets, name)}
        unmatched = [] if chosen else [targets]
    else:
        matches = {target: {n for n in candidates if n == target or n.endswith(f".{target}")} for target in targets}
        chosen = set().union(*matches.values())
        unmatched = [target for target, names in matches.items() if not names]
    ConfigError.raise_if(
        Problem(
            f"peft_lora_target_modules: {json.dumps(target)} matches no Linear of the transformer",
            remedy=_suggestion(target, candidates),
        )
        for target in unmatched
    )
    return {name: full_range(linear) for name, linear in candidates.items() if name in chosen}


def _suggestion(target: str, names: Mapping[str, object]) -> str:
    """A remedy that lists the names most similar to `target`.

    `target` is compared with the endings of names that have as many parts as it has, or one more.
    """
    depth = target.count(".") + 1
    endings = {".".join(name.split(".")[-depth:]) for name in names}
    endings |= {".".join(name.split(".")[-depth - 1 :]) for name in names}
    near = difflib.get_close_matches(target, sorted(endings), n=3, cutoff=0.5)
    examples = near or ["attn.to_q", "ff.linear_in", FUSED_IN]
    return f"{'Did you mean' if near else 'Names look like'} {' or '.join(examples)}{'?' if near else '.'}"


def target_ranges(transformer: nn.Module, options: LoraOptions) -> dict[str, LinearRange]:
    """The rows and columns that `options` adapt, by Linear, in the order of `transformer`.

    Raises:
        ConfigError: a target matches no Linear.
    """
    if options.peft_lora_target_modules is not None:
        return pattern_ranges(transformer, options.peft_lora_target_modules)
    return preset_ranges(transformer, PRESETS[options.flux_lora_target])


def attach(transformer: nn.Module, options: LoraOptions, *, seed: int) -> Adapter:
    """Freeze `transformer` and wrap the Linears that `options` target with new adapters.

    `b` is zero, so the output of `transformer` stays bit-identical. Each layer's `a` is drawn from (`seed`, layer
    name): kaiming-uniform with a = √5, or, with `lora_init_type` gaussian, normal with standard deviation 1/rank.

    Raises:
        ConfigError: a target matches no Linear.
    """
    rank = options.lora_rank
    target = options.flux_lora_target if options.peft_lora_target_modules is None else CUSTOM
    ranges = target_ranges(transformer, options)

    def initial(name: str, adapted_range: LinearRange) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(draw_seed(seed, "init", name))
        a = torch.empty(rank, adapted_range.columns[1] - adapted_range.columns[0])
        if options.lora_init_type == "gaussian":
            nn.init.normal_(a, std=1 / rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        return a, torch.zeros(adapted_range.rows[1] - adapted_range.rows[0], rank)

    transformer.requires_grad_(False)
    layers = {
        name: wrap(
            transformer,
            name,
            *initial(name, adapted_range),
            adapted_range=adapted_range,
            scale=options.alpha / rank,
            dropout=options.lora_dropout,
        )
        for name, adapted_range in ranges.items()
    }
    return Adapter(layers, target=target, alpha=options.alpha)


def wrap(
    transformer: nn.Module,
    name: str,
    a: Tensor,
    b: Tensor,
    *,
    adapted_range: LinearRange,
    scale: float,
    dropout: float = 0.0,
) -> LoraLinear:
    """Wrap the Linear `name` of `transformer` with an adapter of `a` and `b`, in fp32 on the Linear's device."""
    base = adaptable(transformer, name)
    device = next(base.parameters()).device
    layer = LoraLinear(
        base,
        a.to(device, torch.float32),
        b.to(device, torch.float32),
        scale=scale,
        dropout=dropout,
        column_start=adapted_range.columns[0],
        row_start=adapted_range.rows[0],
        base_last=name.endswith(BLOCK_ENDS) and not isinstance(base, AdapterLayer),
    )
    transformer.set_submodule(name, layer)
    return layer


def adaptable(transformer: nn.Module, name: str) -> Adaptable:
    """The Linear `name` of `transformer`, or the adapter layer that wraps it."""
    linear = transformer.get_submodule(name)
    if not isinstance(linear, Adaptable):
        raise TypeError(f"{name} is a {type(linear).__name__}, not a Linear")
    return linear


def detach(transformer: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """Remove `layers`, the adapters attached last, from `transformer`; the wrapped Linears are unchanged."""
    for name, layer in layers.items():
        if transformer.get_submodule(name) is not layer:
            raise ValueError(f"{name} has another adapter on top")
        transformer.set_submodule(name, layer.base)
