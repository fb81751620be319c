"""Quantized weights of frozen Linears, whichever library makes them, behind one call.

A library decides the numbers: scales, zero points, rounding. They are kept as parameters without gradient, and read
back by a line or two of torch, on any device, under autograd, compiled or not; only nf4 is read by its library.
But for fp8-torchao, products are computed with plain weights, made anew for each pass: what is saved is memory, not
work. Why: docs/decisions/0008-quantized-weights.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from simpletuner.base.errors import ConfigError
from simpletuner.base.quiet import quiet_import
from simpletuner.config.precisions import NO_CHANGE, PRECISIONS
from simpletuner.config.values import join_names

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Formats that compute, by the name that options have for them."""

GROUPS = (128, 64, 32)
"""Sizes of a group of weights that share a scale, the best for memory first."""

SLICE = 2**21
"""About as many weights are quantized at once: a library makes several copies of them, some in fp32."""

_NF4_BLOCK = 64
_NESTED_BLOCK = 256
"""Scales of nf4 that share a scale of their own."""
_FP8 = torch.float8_e4m3fn
_TILE = 16
"""What both sides of a product in 8 bits are multiples of, as the kernels want it."""
_ROWS = 64
"""Rows of a slice come in multiples of this, so that no block of nf4 is cut."""


def check_range(weight: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise a ConfigError where fp16 is the `dtype` and cannot hold `weight`. The other formats hold every weight."""
    if dtype != torch.float16 or not weight.numel():
        return
    low, high = weight.aminmax()
    limit = torch.finfo(dtype).max
    largest = max(-low.item(), high.item())
    if limit < largest < math.inf:
        raise ConfigError.of(
            f"mixed_precision = fp16: the weight {name} has a value of {largest:g}",
            f"at most {limit:g}",
            "Give --mixed_precision=bf16.",
        )


def quantized_from(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the weights that are quantized where the model computes in `dtype`, and of their scales: bf16 under
    fp16, whose numbers lose bits below 6e-5, where scales can be.
    """
    return torch.bfloat16 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class Layout:
    """How a weight of `shape` (outputs, inputs) is held in a precision."""

    precision: str
    shape: tuple[int, int]

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and type of each tensor by name, in the order of `unpacked`; the type None is that of the weights.

        Raises:
            ValueError: the precision cannot hold such a shape.
        """
        rows, columns = self.shape
        known = PRECISIONS[self.precision]
        problem = self.problem()
        if problem is not None:
            raise ValueError(problem)
        if self.precision == "nf4-bnb":
            blocks = -(-rows * columns // _NF4_BLOCK)
            return {
                "data": ((-(-rows * columns // 2),), torch.uint8),
                "scale": ((blocks,), torch.uint8),
                "nested": ((-(-blocks // _NESTED_BLOCK),), torch.float32),
                # Of one dimension: a tensor without any cannot be sharded.
                "offset": ((1,), torch.float32),
                "code": ((256,), torch.float32),
            }
        is_quanto = known.library == "optimum.quanto"
        if known.group is None:
            kind = _FP8 if self.precision.startswith("fp8") else torch.int8
            return {"data": (self.shape, kind), "scale": ((rows, 1), None if is_quanto else torch.float32)}
        groups = (rows, columns // self.group, 1)
        return {
            "data": ((rows, columns * known.bits // 8), torch.uint8),
            "scale": (groups, None),
            # Subtracted from what is scaled; torchao's is a whole number, subtracted before.
            **({"shift": (groups, None)} if is_quanto else {"zero": (groups, torch.int8)}),
        }

    def problem(self) -> str | None:
        """Why the precision cannot hold such a shape."""
        rows, columns = self.shape
        if self.precision == "fp8-torchao" and (rows % _TILE or columns % _TILE):
            return f"{rows} outputs and {columns} inputs are no multiples of {_TILE}"
        is_grouped = PRECISIONS[self.precision].group is not None and self.precision != "nf4-bnb"
        return f"{columns} inputs are no multiple of {GROUPS[-1]}" if is_grouped and not self.group else None

    @property
    def is_by_rows(self) -> bool:
        """Whether some rows of a weight can be held, and quantized, without the others."""
        return self.precision != "nf4-bnb"

    @property
    def group(self) -> int:
        """Inputs that share a scale, where groups of them do; 0 where no size divides them."""
        return next((size for size in GROUPS if self.shape[1] % size == 0), 0)

    def unpacked(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """The weight as `dtype`. Where that is the type it was quantized from, these are the library's own bits."""
        data, scale, *rest = tensors
        if self.precision == "nf4-bnb":
            nested, offset, code = rest
            read = torch.ops.bitsandbytes.dequantize_blockwise.default
            scale = read(scale, nested, code, _NESTED_BLOCK, torch.float32) + offset
            weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
                data, scale, _NF4_BLOCK, "nf4", list(self.shape), dtype
            )
            return weight
        if not rest:
            # Numbers of 8 bits are exact in every type that computes; the product is rounded once.
            return data.to(dtype).mul_(scale)
        bits = PRECISIONS[self.precision].bits
        weight = torch.empty((*data.shape, 8 // bits), dtype=dtype, device=data.device)
        for place in range(8 // bits):
            weight[..., place] = (data >> bits * place) & (2**bits - 1)
        grouped = weight.view(self.shape[0], -1, self.group)
        if PRECISIONS[self.precision].library == "torchao":
            grouped.sub_(rest[0]).mul_(scale)
        else:
            grouped.mul_(scale).sub_(rest[0])
        return weight.view(self.shape)

    def product(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """What a Linear with this weight makes of `x`, in the type of `x`."""
        if self.precision != "fp8-torchao":
            return F.linear(x, self.unpacked(tensors, x.dtype))
        # Each row of both sides has a scale; the kernel sums in fp32 and gives bf16.
        rows = x.reshape(-1, self.shape[1]).float()
        highest = torch.finfo(_FP8).max
        scale = rows.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12) / highest
        data = (rows / scale).clamp_(-highest, highest).to(_FP8)
        out = torch._scaled_mm(data, tensors[0].t(), scale, tensors[1].t(), out_dtype=torch.bfloat16)
        return out.to(x.dtype).reshape(*x.shape[:-1], self.shape[0])


def stored_bytes(shape: tuple[int, int], precision: str, itemsize: int) -> int:
    """Bytes of a Linear's weight of `shape` (outputs, inputs) in `precision`, with all that is needed to read it; plain
    weights are of `itemsize` bytes each.

    Raises:
        ValueError: the precision cannot hold such a shape.
    """
    if precision == NO_CHANGE:
        return math.prod(shape) * itemsize
    fields = Layout(precision, shape).fields().values()
    return sum(math.prod(own) * (dtype.itemsize if dtype else itemsize) for own, dtype in fields)


class _Saved(torch.autograd.Function):
    """`x` itself; saves `tensors` for the gradient of what is computed from it, which finds them in `saved`.

    A Function's tensors are saved after its forward. Recompute stops at a block's last saved tensor: saved by the
    product itself, they would make recompute compute the block's last product, which nothing reads.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, saved: list[Any], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        saved.append(ctx)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return gradients[0], None, *(None for _ in ctx.needs_input_grad[2:])


class _Product(torch.autograd.Function):
    """As `_Frozen`, with the weight that a `_Saved` keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, saved: list[Any], *tensors: Tensor) -> Tensor:
        ctx.layout, ctx.saved = layout, saved
        return layout.product(x, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        tensors = ctx.saved[0].saved_tensors  # once, as below
        weight = ctx.layout.unpacked(tensors, gradient.dtype)
        return gradient @ weight, None, None, *(None for _ in tensors)


class _Frozen(torch.autograd.Function):
    """A product with a packed weight, which alone is kept for the way back and unpacked again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, *tensors: Tensor) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(*tensors)
        return layout.product(x, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        tensors = ctx.saved_tensors  # once: recomputed blocks give them a single time
        weight = ctx.layout.unpacked(tensors, gradient.dtype)
        return gradient @ weight, None, *(None for _ in tensors)


class QuantizedLinear(nn.Module):
    """A frozen Linear whose weight is held in a precision of `PRECISIONS`. It computes in the type of its input, or,
    under autocast, in autocast's. Made by `quantized`; by itself it has room for the tensors and not their values.
    """

    def __init__(self, shape: tuple[int, int], precision: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.layout = Layout(precision, shape)
        self.dtype = dtype
        """Of the weights before."""
        fields = self.layout.fields()
        self.names = tuple(fields)
        for name, (own, kind) in fields.items():
            self._hold(name, torch.empty(own, dtype=kind or dtype))
        if precision == "nf4-bnb":
            with quiet_import():
                import bitsandbytes  # noqa: F401  its operators, of which torch knows only then

    def _hold(self, name: str, tensor: Tensor) -> None:
        # Not a buffer: what shards a model, or counts it, looks at parameters.
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.layout.precision}"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that the weight is held in."""
        return tuple(self.get_parameter(name) for name in self.names)

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """A plain copy, made at each call, in the type of before."""
        return self.layout.unpacked(self.tensors, self.dtype)

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        tensors = self.tensors
        if not (x.requires_grad and torch.is_grad_enabled()):
            # Without a gradient the compiler traces a Function's forward itself, and drops `ctx` where there are as
            # many values as names.
            return self.layout.product(x, tensors)
        out: Tensor
        if torch.compiler.is_compiling():
            # A compiled graph saves what it saves after all of its products.
            out = _Frozen.apply(x, self.layout, *tensors)  # type: ignore[no-untyped-call]
        else:
            saved: list[Any] = []
            x = _Saved.apply(x, saved, *tensors)  # type: ignore[no-untyped-call]
            out = _Product.apply(x, self.layout, saved, *tensors)  # type: ignore[no-untyped-call]
        return out


def targets(module: nn.Module, within: Sequence[str], precision: str) -> dict[str, nn.Linear]:
    """The Linears of `module` whose names begin with one of `within`.

    Raises:
        ConfigError: `precision` cannot hold them; each is named.
    """
    found = {
        name: linear
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and name.startswith(tuple(within))
    }
    problems = {name: Layout(precision, (it.out_features, it.in_features)).problem() for name, it in found.items()}
    odd = {name: problem for name, problem in problems.items() if problem is not None}
    if odd:
        name, problem = next(iter(odd.items()))
        others = f", and {len(odd) - 1} more like it" if len(odd) > 1 else ""
        raise ConfigError.of(
            f"{precision} cannot hold {name}{others}: {problem}",
            remedy="int8-quanto and int8-torchao hold every shape.",
        )
    return found


def make_room(module: nn.Module, linears: Mapping[str, nn.Linear], precision: str, dtype: torch.dtype) -> None:
    """Put quantized Linears without values, on torch's default device, in the place of `linears` of `module`."""
    for name, linear in linears.items():
        shape = linear.out_features, linear.in_features
        module.set_submodule(name, QuantizedLinear(shape, precision, dtype))


def quantized(linear: nn.Linear, precision: str, device: torch.device | str | None = None) -> QuantizedLinear:
    """`linear`, frozen, in `precision` on `device`, its own by default. It is quantized where its weight lies."""
    if "bias" in dict(linear.named_parameters()):
        raise ValueError("a Linear with a bias: no block of ours has one")
    weight = linear.weight.detach()
    device = weight.device if device is None else device
    return held(linear, precision, packed(weight, precision), weight.dtype, device)


def held(
    linear: nn.Linear, precision: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> QuantizedLinear:
    """`linear`, frozen, with a weight that `tensors` hold in `precision`, on `device`; its plain copy is of `dtype`."""
    with torch.device("meta"):
        made = QuantizedLinear((linear.out_features, linear.in_features), precision, dtype)
    for name, tensor in tensors.items():
        made._hold(name, tensor.to(device))
    return made.train(linear.training)


@torch.no_grad()
def packed(weight: Float[Tensor, "rows columns"], precision: str) -> dict[str, Tensor]:
    """The tensors that hold `weight` in `precision`, on its device. This is where the libraries are."""
    rows, columns = weight.shape
    layout = Layout(precision, (rows, columns))
    step = max(_ROWS, SLICE // columns // _ROWS * _ROWS)
    make = _MAKERS[PRECISIONS[precision].library]
    parts = [make(weight[start : start + step].contiguous(), layout) for start in range(0, rows, step)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if precision == "nf4-bnb":
        whole |= _nested(whole.pop("absmax"))
    elif PRECISIONS[precision].group is None:
        # A row of zeros has no scale, and was divided by it.
        is_empty = whole["scale"] == 0
        whole["scale"].masked_fill_(is_empty, 1)
        whole["data"].view(torch.uint8).masked_fill_(is_empty, 0)
    return {name: whole[name] for name in layout.fields()}


def _with_quanto(weight: Tensor, layout: Layout) -> dict[str, Tensor]:
    with quiet_import():
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes

    # Its tensors that hold such numbers are not made: to unpack theirs they compile an extension, for a minute.
    kinds = {"int8": "qint8", "int4": "qint4", "int2": "qint2", "fp8": "qfloat8_e4m3fn"}
    kind = qtypes[kinds[layout.precision.removesuffix("-quanto")]]
    if kind.bits == 8:
        scale = AbsmaxOptimizer().optimize(weight, kind, 0)
        axis, given = (0, scale) if len(weight) > 1 else (None, scale[0, 0])  # to it one row is no row
        data = torch.ops.quanto.quantize_symmetric(weight, kind.dtype, axis, given)
        return {"data": data, "scale": scale}
    grouped = weight.reshape(-1, layout.group)
    scale, shift = MaxOptimizer().optimize(grouped, kind, 0)
    scale.masked_fill_(scale == 0, 1)  # a group of one value, which is then its shift
    data = torch.ops.quanto.quantize_affine(grouped, kind.bits, 0, None, scale, shift)
    return _grouped(data, {"scale": scale, "shift": shift}, len(weight), kind.bits)


def _with_torchao(weight: Tensor, layout: Layout) -> dict[str, Tensor]:
    with quiet_import():
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    if layout.precision != "int4-torchao":
        kind = Int8Tensor if layout.precision == "int8-torchao" else Float8Tensor
        made = kind.from_hp(weight, granularity=PerRow())
        return {"data": made.qdata, "scale": made.scale}
    block, low, high = (1, layout.group), 0, 15
    scale, zero = choose_qparams_affine(
        weight,
        MappingType.ASYMMETRIC,
        block,
        torch.uint8,
        low,
        high,
        scale_dtype=weight.dtype,
        zero_point_dtype=torch.int8,
    )
    data = quantize_affine(weight, block, scale, zero, torch.uint8, low, high)
    return _grouped(data, {"scale": scale, "zero": zero}, len(weight), 4)


def _with_bitsandbytes(weight: Tensor, layout: Layout) -> dict[str, Tensor]:
    with quiet_import():
        from bitsandbytes import functional

    if layout.precision == "int8-bnb":
        # fp16 is what its kernels take; it has more digits than bf16, and weights are within its range.
        data, highest, _ = functional.int8_vectorwise_quant(weight.half())
        return {"data": data, "scale": highest[:, None] / 127}
    data, state = functional.quantize_4bit(weight, blocksize=_NF4_BLOCK, quant_type="nf4")
    return {"data": data.reshape(-1), "absmax": state.absmax}


_MAKERS = {"optimum.quanto": _with_quanto, "torchao": _with_torchao, "bitsandbytes": _with_bitsandbytes}


def _nested(absmax: Float[Tensor, " blocks"]) -> dict[str, Tensor]:
    """The scales of nf4 in 8 bits (double quantization, Dettmers et al., arXiv 2305.14314)."""
    from bitsandbytes import functional

    offset = absmax.mean().reshape(1)
    scale, state = functional.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
    return {"scale": scale, "nested": state.absmax, "offset": offset, "code": state.code}


def _grouped(data: Tensor, sides: Mapping[str, Tensor], rows: int, bits: int) -> dict[str, Tensor]:
    """Numbers of `bits` each, side by side in bytes, the first in the lowest bits; and what belongs to their groups."""
    parts = data.reshape(rows, -1, 8 // bits).unbind(-1)
    whole = parts[0].clone()
    for place, part in enumerate(parts[1:], start=1):
        whole |= part << bits * place
    return {"data": whole, **{name: side.reshape(rows, -1, 1) for name, side in sides.items()}}


def library_version(precision: str) -> str:
    """Of the library that makes `precision`."""
    return version(PRECISIONS[precision].distribution)


def check_precision(precision: str, device: torch.device, option: str) -> None:
    """Raise a ConfigError, before anything is loaded, where `device` cannot run `precision`."""
    if precision == NO_CHANGE:
        return
    if PRECISIONS[precision].needs_accelerator and device.type == "cpu":
        able = [name for name, known in PRECISIONS.items() if not known.needs_accelerator]
        raise ConfigError.of(
            f"{option} = {precision} on a machine without a GPU, where torchao does not compute with it",
            join_names(able),
            f"Nearest is {'int4-quanto' if PRECISIONS[precision].bits == 4 else 'fp8wo-torchao'}.",
        )
    if precision == "fp8-torchao" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise ConfigError.of(
                f"{option} = fp8-torchao on a GPU of compute capability {capability[0]}.{capability[1]}",
                "8.9 or more, which multiplies in 8 bits",
                "fp8wo-torchao takes the same memory and runs there.",
            )
