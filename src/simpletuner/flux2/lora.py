"""Low-rank adapters: small trainable matrices beside frozen ones.

`attach` wraps the chosen Linears of a transformer and returns the `Adapter`, which is all that is trained,
saved and switched off. In a single block one matrix makes q, k, v and the feed-forward's input, and one takes
the attention's and the feed-forward's output; a preset that wants a part of them trains only those rows or
columns.
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
from simpletuner.flux2.learning import Learning
from simpletuner.memory.precision import QuantizedLinear

DOUBLE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE_OUT = ("attn.to_out.0", "attn.to_add_out")
DOUBLE_MLP = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
FUSED_IN = "attn.to_qkv_mlp_proj"
FUSED_OUT = "attn.to_out"
BLOCK_ENDS = ("ff.linear_out", FUSED_OUT)
"""The last Linear of each kind of block. Nothing else reads its input."""

FusedPart = Literal["whole", "attention", "mlp"]


@dataclass(frozen=True)
class Preset:
    """Linears by their place in a block: a double block's, and the live part of a single block's two."""

    double: tuple[str, ...]
    fused_in: FusedPart | None
    fused_out: FusedPart | None


PRESETS: dict[str, Preset] = {
    "all": Preset(DOUBLE_QKV + DOUBLE_OUT + DOUBLE_MLP, fused_in="whole", fused_out="whole"),
    "attention": Preset(DOUBLE_QKV + DOUBLE_OUT, fused_in="attention", fused_out="attention"),
    "mlp": Preset(DOUBLE_MLP, fused_in="mlp", fused_out="mlp"),
    "tiny": Preset(DOUBLE_QKV, fused_in="attention", fused_out=None),
}

CUSTOM = "custom"
"""The target's name where a list or a pattern was given instead of a preset."""


class _AddToRows(torch.autograd.Function):
    """`out[..., start:start + width] += delta` without a copy of `out`, which is wide, in either direction.

    The other rows keep their very bits, which adding zeros would not promise (-0.0 + 0.0 is 0.0).
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
    """A frozen Linear plus `scale · ΔW`, computed from the input. `base` may itself be an `AdapterLayer`: then both
    are added. Where `is_enabled` is False the layer is `base`, bit for bit.
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

    `a` (rank × live columns) and `b` (live rows × rank) are fp32 and are cast to the input's type where they
    are used.
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
        """Whether the base product comes after the adapter's products. The order decides in which order autograd sums
        the gradients of the input, hence last bits where more than one Linear reads it.
        """
        self.train(base.training)

    @property
    def place(self) -> "Range":
        """The rows and columns that learn."""
        return Range((self.row_start, self.row_stop), (self.column_start, self.column_stop))

    @property
    def has_all_columns(self) -> bool:
        return self.column_stop - self.column_start == self.in_features

    @property
    def has_all_rows(self) -> bool:
        return self.row_stop - self.row_start == self.out_features

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        return self.deferred(x)()

    def deferred(self, x: Float[Tensor, "*batch columns"]) -> Callable[[], Float[Tensor, "*batch rows"]]:
        """Return a function that computes `self(x)`. What comes before the base product is computed now."""
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
        """`a` and `b` at full size on the CPU, exactly zero where nothing learns, `scale` folded into `b`."""
        a = torch.zeros(self.rank, self.in_features)
        a[:, self.column_start : self.column_stop] = self.a
        b = torch.zeros(self.out_features, self.rank)
        b[self.row_start : self.row_stop] = self.b * self.scale
        return a, b


Adaptable = nn.Linear | QuantizedLinear | AdapterLayer
"""What an adapter can be put on."""


class AdapterKind(TypedDict):
    """The adapted Linears that share a place in their blocks."""

    name: str
    layers: int
    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    parameters: int


class Audit(TypedDict):
    """What was attached, for people and for JSON. `bytes` is the size of the live fp32 parameters."""

    target: str
    layers: int
    parameters: int
    bytes: int
    kinds: list[AdapterKind]


class Adapter(Learning):
    """The attached layers by name, in the transformer's order. Nothing else is trained."""

    foreign = "adapter state of other layers"

    def __init__(self, layers: Mapping[str, LoraLinear], *, target: str, alpha: float) -> None:
        self.layers = dict(layers)
        self.target = target
        """A key of `PRESETS`, or "custom"."""
        self.alpha = alpha
        """As the user gave it; each layer's `scale` is already alpha/rank."""
        self.masters = None  # adapters are fp32 themselves

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Each live tensor, as "<layer>.a" or "<layer>.b"."""
        pairs = {name: (layer.a, layer.b) for name, layer in self.layers.items()}
        return {
            f"{name}.{matrix}": each for name, pair in pairs.items() for matrix, each in zip("ab", pair, strict=True)
        }

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model bit for bit, at its cost. For use without gradients: what is
        checkpointed would be recomputed after the end of this, with the adapter back on.
        """
        before = [layer.is_enabled for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.is_enabled = False
        try:
            yield
        finally:
            for layer, was_enabled in zip(self.layers.values(), before, strict=True):
                layer.is_enabled = was_enabled

    @contextlib.contextmanager
    def showing(self, whole: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, `weights` are these whole tensors, for a file of them; nothing is copied, and nothing can compute."""
        kept = {name: weight.data for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.data = whole[name].to(weight.device)  # on another device its hooks for the gradient would be lost
        try:
            yield
        finally:
            for name, weight in self.weights.items():
                weight.data = kept[name]

    def expanded(self) -> dict[str, Float[Tensor, "_ _"]]:
        """An ordinary LoRA in diffusers' names, full size, fp32, on the CPU, alpha/rank folded into B."""
        tensors = {}
        for name, layer in self.layers.items():
            a, b = layer.expanded()
            tensors[f"transformer.{name}.lora_A.weight"] = a
            tensors[f"transformer.{name}.lora_B.weight"] = b
        return tensors

    def audit(self) -> Audit:
        """What learns, counted from the layers themselves."""
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
        return Audit(
            target=self.target,
            layers=len(self.layers),
            parameters=self.parameter_count,
            bytes=sum(parameter.numel() * parameter.element_size() for parameter in self.parameters()),
            kinds=kinds,
        )


@dataclass(frozen=True)
class Range:
    """The rows and columns of one Linear that learn, each as (start, stop)."""

    rows: tuple[int, int]
    columns: tuple[int, int]


def linears(transformer: nn.Module) -> dict[str, Adaptable]:
    """Every Linear of `transformer` by name; one that wears an adapter is named once, as the adapter."""
    found: dict[str, Adaptable] = {}
    for name, module in transformer.named_modules():
        inside = isinstance(transformer.get_submodule(name.rpartition(".")[0]), AdapterLayer)
        if isinstance(module, Adaptable) and not inside:
            found[name] = module
    return found


def whole(linear: Adaptable) -> Range:
    return Range(rows=(0, linear.out_features), columns=(0, linear.in_features))


def preset_ranges(transformer: nn.Module, preset: Preset) -> dict[str, Range]:
    """What `preset` trains in `transformer`, in the transformer's order.

    Raises:
        ConfigError: an entry of the preset names a Linear that no block has.
    """
    ranges: dict[str, Range] = {}
    missing = {
        *preset.double,
        *([FUSED_IN] if preset.fused_in else []),
        *([FUSED_OUT] if preset.fused_out else []),
    }
    for name, linear in linears(transformer).items():
        blocks, _, place = name.partition(".")
        place = place.partition(".")[2]
        rows, columns = whole(linear).rows, whole(linear).columns
        if blocks == "transformer_blocks" and place in preset.double:
            pass
        elif blocks == "single_transformer_blocks" and place == FUSED_IN and preset.fused_in:
            rows = _cut(preset.fused_in, at=3 * linear.in_features, end=linear.out_features)
        elif blocks == "single_transformer_blocks" and place == FUSED_OUT and preset.fused_out:
            columns = _cut(preset.fused_out, at=linear.out_features, end=linear.in_features)
        else:
            continue
        ranges[name] = Range(rows, columns)
        missing.discard(place)
    ConfigError.raise_if(
        Problem(f"the LoRA preset wants {place}", "a model whose blocks have it") for place in sorted(missing)
    )
    return ranges


def _cut(part: FusedPart, *, at: int, end: int) -> tuple[int, int]:
    """Attention comes first in both fused matrices, the feed-forward after it."""
    return {"whole": (0, end), "attention": (0, at), "mlp": (at, end)}[part]


def pattern_ranges(transformer: nn.Module, targets: str | tuple[str, ...]) -> dict[str, Range]:
    """The Linears that `targets` names: full names or their endings after a dot, or one regular expression.

    Raises:
        ConfigError: an entry, or the expression, that matches no Linear.
    """
    found = linears(transformer)
    if isinstance(targets, str):
        chosen = {name for name in found if re.fullmatch(targets, name)}
        unmatched = [] if chosen else [targets]
    else:
        matches = {target: {n for n in found if n == target or n.endswith(f".{target}")} for target in targets}
        chosen = set().union(*matches.values())
        unmatched = [target for target, names in matches.items() if not names]
    ConfigError.raise_if(
        Problem(
            f"peft_lora_target_modules: {json.dumps(target)} matches no Linear of the transformer",
            remedy=_suggestion(target, found),
        )
        for target in unmatched
    )
    return {name: whole(linear) for name, linear in found.items() if name in chosen}


def _suggestion(target: str, names: Mapping[str, object]) -> str:
    """The names nearest to `target`, at the depth (number of dots) at which it was written."""
    depth = target.count(".") + 1
    endings = {".".join(name.split(".")[-depth:]) for name in names}
    endings |= {".".join(name.split(".")[-depth - 1 :]) for name in names}
    near = difflib.get_close_matches(target, sorted(endings), n=3, cutoff=0.5)
    examples = near or ["attn.to_q", "ff.linear_in", FUSED_IN]
    return f"{'Did you mean' if near else 'Names look like'} {' or '.join(examples)}{'?' if near else '.'}"


def wanted_ranges(transformer: nn.Module, options: LoraOptions) -> dict[str, Range]:
    """What `options` train in `transformer`, by Linear, in the transformer's order.

    Raises:
        ConfigError: a target that matches nothing.
    """
    if options.peft_lora_target_modules is not None:
        return pattern_ranges(transformer, options.peft_lora_target_modules)
    return preset_ranges(transformer, PRESETS[options.flux_lora_target])


def attach(transformer: nn.Module, options: LoraOptions, *, seed: int) -> Adapter:
    """Freeze `transformer` and put fresh adapters where `options` says; its output keeps every bit.

    `a` is drawn for each layer from (`seed`, the layer's name): kaiming-uniform with a = √5, or, with
    `lora_init_type` gaussian, normal with standard deviation 1/rank. `b` is zero.

    Raises:
        ConfigError: a target that matches nothing.
    """
    rank = options.lora_rank
    target = options.flux_lora_target if options.peft_lora_target_modules is None else CUSTOM
    ranges = wanted_ranges(transformer, options)

    def initial(name: str, place: Range) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(draw_seed(seed, "init", name))
        a = torch.empty(rank, place.columns[1] - place.columns[0])
        if options.lora_init_type == "gaussian":
            nn.init.normal_(a, std=1 / rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        return a, torch.zeros(place.rows[1] - place.rows[0], rank)

    transformer.requires_grad_(False)
    layers = {
        name: wrap(
            transformer,
            name,
            *initial(name, place),
            place=place,
            scale=options.alpha / rank,
            dropout=options.lora_dropout,
        )
        for name, place in ranges.items()
    }
    return Adapter(layers, target=target, alpha=options.alpha)


def wrap(
    transformer: nn.Module,
    name: str,
    a: Tensor,
    b: Tensor,
    *,
    place: Range,
    scale: float,
    dropout: float = 0.0,
) -> LoraLinear:
    """Replace the Linear `name` of `transformer` by itself with an adapter, fp32, on the Linear's device."""
    base = adaptable(transformer, name)
    device = next(base.parameters()).device
    layer = LoraLinear(
        base,
        a.to(device, torch.float32),
        b.to(device, torch.float32),
        scale=scale,
        dropout=dropout,
        column_start=place.columns[0],
        row_start=place.rows[0],
        base_last=name.endswith(BLOCK_ENDS) and not isinstance(base, AdapterLayer),
    )
    transformer.set_submodule(name, layer)
    return layer


def adaptable(transformer: nn.Module, name: str) -> Adaptable:
    """The Linear `name` of `transformer`, or the adapter that is on it."""
    linear = transformer.get_submodule(name)
    if not isinstance(linear, Adaptable):
        raise TypeError(f"{name} is a {type(linear).__name__}, not a Linear")
    return linear


def detach(transformer: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """Take `layers`, the last that were put on `transformer`, off again: the Linears below are as they were."""
    for name, layer in layers.items():
        if transformer.get_submodule(name) is not layer:
            raise ValueError(f"{name} has another adapter on top")
        transformer.set_submodule(name, layer.base)
