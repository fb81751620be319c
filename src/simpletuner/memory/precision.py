"""Quantize the weights of frozen Linears with any of the supported libraries, behind one interface.

The library determines the numbers: scales, zero points, rounding. They are stored as parameters without gradient.
A line or two of torch dequantizes them on any device, under autograd, compiled or not; only nf4 is dequantized by its
library. Except for fp8-torchao, products use plain weights that are dequantized for each pass: quantization saves
memory, not work. Why: docs/decisions/0008-quantized-weights.md.
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
"""Dtypes for computing, by their names in the options."""

GROUP_SIZES = (128, 64, 32)
"""Sizes of a group of weights that share a scale. The first takes least memory."""

SLICE = 2**21
"""About how many weights are quantized at once. A library makes several copies of them, some in fp32."""

_NF4_BLOCK = 64
_NESTED_BLOCK = 256
"""Number of nf4 scales that share one second-level scale."""
_FP8 = torch.float8_e4m3fn
_TILE = 16
"""The kernels of 8-bit products need both sides of a weight to be multiples of this."""
_ROWS = 64
"""A slice has a multiple of this many rows, so that no block of nf4 is cut."""


def check_range(weight: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise a ConfigError if `dtype` is fp16 and `weight` exceeds its range. Other dtypes hold every weight."""
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
    """Dtype of the weights before quantization, and of their scales, in a model that computes in `dtype`.

    It is bf16 for fp16: fp16 loses bits below 6e-5, and scales can be that small. Otherwise it is `dtype`.
    """
    return torch.bfloat16 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class WeightLayout:
    """The tensors that store a weight of `shape` (outputs, inputs) in a precision."""

    precision: str
    shape: tuple[int, int]

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and dtype of each tensor by name, in the order of `unpacked`. None stands for the dtype of the weights.

        Raises:
            ValueError: the precision does not support this shape.
        """
        rows, columns = self.shape
        entry = PRECISIONS[self.precision]
        problem = self.problem()
        if problem is not None:
            raise ValueError(problem)
        if self.precision == "nf4-bnb":
            blocks = -(-rows * columns // _NF4_BLOCK)
            return {
                "data": ((-(-rows * columns // 2),), torch.uint8),
                "scale": ((blocks,), torch.uint8),
                "nested": ((-(-blocks // _NESTED_BLOCK),), torch.float32),
                # Not a scalar: a tensor without dimensions cannot be sharded.
                "offset": ((1,), torch.float32),
                "code": ((256,), torch.float32),
            }
        is_quanto = entry.library == "optimum.quanto"
        if entry.group is None:
            dtype = _FP8 if self.precision.startswith("fp8") else torch.int8
            return {"data": (self.shape, dtype), "scale": ((rows, 1), None if is_quanto else torch.float32)}
        groups = (rows, columns // self.group, 1)
        return {
            "data": ((rows, columns * entry.bits // 8), torch.uint8),
            "scale": (groups, None),
            # quanto subtracts `shift` after scaling; torchao subtracts the integer `zero` before it.
            **({"shift": (groups, None)} if is_quanto else {"zero": (groups, torch.int8)}),
        }

    def problem(self) -> str | None:
        """Why the precision does not support this shape; None if it does."""
        rows, columns = self.shape
        if self.precision == "fp8-torchao" and (rows % _TILE or columns % _TILE):
            return f"{rows} outputs and {columns} inputs are not multiples of {_TILE}"
        is_grouped = PRECISIONS[self.precision].group is not None and self.precision != "nf4-bnb"
        return f"{columns} inputs are not a multiple of {GROUP_SIZES[-1]}" if is_grouped and not self.group else None

    @property
    def is_by_rows(self) -> bool:
        """Whether some rows of a weight can be quantized and stored without the others."""
        return self.precision != "nf4-bnb"

    @property
    def group(self) -> int:
        """Number of inputs that share a scale, in precisions with groups; 0 if no group size divides the inputs."""
        return next((size for size in GROUP_SIZES if self.shape[1] % size == 0), 0)

    def unpacked(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """The dequantized weight in `dtype`; bit-identical to the library's if it was quantized from that dtype."""
        data, scale, *extra_tensors = tensors
        if self.precision == "nf4-bnb":
            nested, offset, code = extra_tensors
            dequantize = torch.ops.bitsandbytes.dequantize_blockwise.default
            scale = dequantize(scale, nested, code, _NESTED_BLOCK, torch.float32) + offset
            weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
                data, scale, _NF4_BLOCK, "nf4", list(self.shape), dtype
            )
            return weight
        if not extra_tensors:
            # 8-bit numbers are exact in every dtype for computing; the product is rounded once.
            return data.to(dtype).mul_(scale)
        bits = PRECISIONS[self.precision].bits
        weight = torch.empty((*data.shape, 8 // bits), dtype=dtype, device=data.device)
        for index in range(8 // bits):
            weight[..., index] = (data >> bits * index) & (2**bits - 1)
        grouped = weight.view(self.shape[0], -1, self.group)
        if PRECISIONS[self.precision].library == "torchao":
            grouped.sub_(extra_tensors[0]).mul_(scale)
        else:
            grouped.mul_(scale).sub_(extra_tensors[0])
        return weight.view(self.shape)

    def product(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Output of a Linear with this weight for `x`, in the dtype of `x`."""
        if self.precision != "fp8-torchao":
            return F.linear(x, self.unpacked(tensors, x.dtype))
        # Each row of both factors has a scale; the kernel accumulates in fp32 and returns bf16.
        rows = x.reshape(-1, self.shape[1]).float()
        highest = torch.finfo(_FP8).max
        scale = rows.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12) / highest
        data = (rows / scale).clamp_(-highest, highest).to(_FP8)
        out = torch._scaled_mm(data, tensors[0].t(), scale, tensors[1].t(), out_dtype=torch.bfloat16)
        return out.to(x.dtype).reshape(*x.shape[:-1], self.shape[0])


def stored_bytes(shape: tuple[int, int], precision: str, itemsize: int) -> int:
    """Bytes of a Linear's weight of `shape` (outputs, inputs) in `precision`, including scales and tables.

    `itemsize` is that of the plain weights in bytes.

    Raises:
        ValueError: the precision does not support this shape.
    """
    if precision == NO_CHANGE:
        return math.prod(shape) * itemsize
    fields = WeightLayout(precision, shape).fields().values()
    return sum(math.prod(field_shape) * (dtype.itemsize if dtype else itemsize) for field_shape, dtype in fields)


class _Saved(torch.autograd.Function):
    """Return `x` and save `tensors` for the gradient of the following `_Product`, which gets them from `saved`.

    A Function saves its tensors after its forward, and recompute stops at a block's last saved tensor. If the product
    saved them itself, recompute would also compute the block's last product, which nothing uses.
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
    """Product with a quantized weight that a `_Saved` has saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: WeightLayout, saved: list[Any], *tensors: Tensor) -> Tensor:
        ctx.layout, ctx.saved = layout, saved
        return layout.product(x, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        tensors = ctx.saved[0].saved_tensors  # read once, as in _Frozen
        weight = ctx.layout.unpacked(tensors, gradient.dtype)
        return gradient @ weight, None, None, *(None for _ in tensors)


class _Frozen(torch.autograd.Function):
    """Product with a quantized weight. Saves only the quantized tensors and dequantizes them again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: WeightLayout, *tensors: Tensor) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(*tensors)
        return layout.product(x, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        tensors = ctx.saved_tensors  # read once: under checkpointing a second read raises
        weight = ctx.layout.unpacked(tensors, gradient.dtype)
        return gradient @ weight, None, *(None for _ in tensors)


class QuantizedLinear(nn.Module):
    """A frozen Linear with a weight in a precision of `PRECISIONS`. `quantized` makes one from a Linear.

    It computes in the dtype of its input, or under autocast in autocast's. The constructor only allocates the tensors.
    """

    def __init__(self, shape: tuple[int, int], precision: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.layout = WeightLayout(precision, shape)
        self.dtype = dtype
        """Dtype of the weight before quantization."""
        fields = self.layout.fields()
        self.names = tuple(fields)
        for name, (field_shape, field_dtype) in fields.items():
            self._set_tensor(name, torch.empty(field_shape, dtype=field_dtype or dtype))
        if precision == "nf4-bnb":
            with quiet_import():
                import bitsandbytes  # noqa: F401  registers its operators with torch

    def _set_tensor(self, name: str, tensor: Tensor) -> None:
        # Not a buffer: sharding and counting use parameters.
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.layout.precision}"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that store the weight, in the order of `names`."""
        return tuple(self.get_parameter(name) for name in self.names)

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """The dequantized weight, in the dtype it had before quantization; a new tensor at each access."""
        return self.layout.unpacked(self.tensors, self.dtype)

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        tensors = self.tensors
        if not (x.requires_grad and torch.is_grad_enabled()):
            # No autograd.Function without a gradient: the compiler would trace its `forward` directly, and omit `ctx`
            # if the number of arguments equals the number of parameters.
            return self.layout.product(x, tensors)
        out: Tensor
        if torch.compiler.is_compiling():
            # A compiled graph saves tensors after all of its products.
            out = _Frozen.apply(x, self.layout, *tensors)  # type: ignore[no-untyped-call]
        else:
            saved: list[Any] = []
            x = _Saved.apply(x, saved, *tensors)  # type: ignore[no-untyped-call]
            out = _Product.apply(x, self.layout, saved, *tensors)  # type: ignore[no-untyped-call]
        return out


def quantizable_linears(module: nn.Module, within: Sequence[str], precision: str) -> dict[str, nn.Linear]:
    """The Linears of `module` whose names begin with one of `within`, by name.

    Raises:
        ConfigError: `precision` does not support the shape of a Linear; the first is named and the others are counted.
    """
    linears = {
        name: linear
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and name.startswith(tuple(within))
    }
    problems = {
        name: WeightLayout(precision, (linear.out_features, linear.in_features)).problem()
        for name, linear in linears.items()
    }
    unsupported = {name: problem for name, problem in problems.items() if problem is not None}
    if unsupported:
        name, problem = next(iter(unsupported.items()))
        others = f" and {len(unsupported) - 1} more" if len(unsupported) > 1 else ""
        raise ConfigError.of(
            f"{precision} cannot hold {name}{others}: {problem}",
            remedy="int8-quanto and int8-torchao support every shape.",
        )
    return linears


def replace_by_empty(module: nn.Module, linears: Mapping[str, nn.Linear], precision: str, dtype: torch.dtype) -> None:
    """Replace `linears` of `module` with quantized Linears with uninitialized tensors on torch's default device."""
    for name, linear in linears.items():
        shape = linear.out_features, linear.in_features
        module.set_submodule(name, QuantizedLinear(shape, precision, dtype))


def quantized(linear: nn.Linear, precision: str, device: torch.device | str | None = None) -> QuantizedLinear:
    """Quantize `linear` on the device of its weight; return it, frozen, on `device`, by default the same device."""
    if "bias" in dict(linear.named_parameters()):
        raise ValueError("a Linear with a bias: no block of a supported model has one")
    weight = linear.weight.detach()
    device = weight.device if device is None else device
    return quantized_from_tensors(linear, precision, quantized_tensors(weight, precision), weight.dtype, device)


def quantized_from_tensors(
    linear: nn.Linear, precision: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> QuantizedLinear:
    """A frozen Linear like `linear` on `device`; `tensors` are its weight in `precision`, quantized from `dtype`."""
    with torch.device("meta"):
        frozen = QuantizedLinear((linear.out_features, linear.in_features), precision, dtype)
    for name, tensor in tensors.items():
        frozen._set_tensor(name, tensor.to(device))
    return frozen.train(linear.training)


@torch.no_grad()
def quantized_tensors(weight: Float[Tensor, "rows columns"], precision: str) -> dict[str, Tensor]:
    """Quantize `weight` to `precision` on its device; return the tensors by name. Calls the libraries."""
    rows, columns = weight.shape
    layout = WeightLayout(precision, (rows, columns))
    step = max(_ROWS, SLICE // columns // _ROWS * _ROWS)
    quantize_slice = _QUANTIZERS[PRECISIONS[precision].library]
    parts = [quantize_slice(weight[start : start + step].contiguous(), layout) for start in range(0, rows, step)]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if precision == "nf4-bnb":
        tensors |= _nested(tensors.pop("absmax"))
    elif PRECISIONS[precision].group is None:
        # A row of zeros has the scale 0, by which it was divided.
        is_empty = tensors["scale"] == 0
        tensors["scale"].masked_fill_(is_empty, 1)
        tensors["data"].view(torch.uint8).masked_fill_(is_empty, 0)
    return {name: tensors[name] for name in layout.fields()}


def _with_quanto(weight: Tensor, layout: WeightLayout) -> dict[str, Tensor]:
    with quiet_import():
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes

    # quanto's tensor classes are not used: to dequantize they compile an extension, which takes a minute.
    qtype_names = {"int8": "qint8", "int4": "qint4", "int2": "qint2", "fp8": "qfloat8_e4m3fn"}
    qtype = qtypes[qtype_names[layout.precision.removesuffix("-quanto")]]
    if qtype.bits == 8:
        scale = AbsmaxOptimizer().optimize(weight, qtype, 0)
        axis, axis_scale = (0, scale) if len(weight) > 1 else (None, scale[0, 0])  # quanto has no axis for a single row
        data = torch.ops.quanto.quantize_symmetric(weight, qtype.dtype, axis, axis_scale)
        return {"data": data, "scale": scale}
    grouped = weight.reshape(-1, layout.group)
    scale, shift = MaxOptimizer().optimize(grouped, qtype, 0)
    scale.masked_fill_(scale == 0, 1)  # all values of the group are equal to its shift
    data = torch.ops.quanto.quantize_affine(grouped, qtype.bits, 0, None, scale, shift)
    return _grouped(data, {"scale": scale, "shift": shift}, len(weight), qtype.bits)


def _with_torchao(weight: Tensor, layout: WeightLayout) -> dict[str, Tensor]:
    with quiet_import():
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    if layout.precision != "int4-torchao":
        tensor_class = Int8Tensor if layout.precision == "int8-torchao" else Float8Tensor
        quantized_weight = tensor_class.from_hp(weight, granularity=PerRow())
        return {"data": quantized_weight.qdata, "scale": quantized_weight.scale}
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


def _with_bitsandbytes(weight: Tensor, layout: WeightLayout) -> dict[str, Tensor]:
    with quiet_import():
        from bitsandbytes import functional

    if layout.precision == "int8-bnb":
        # Its kernels take fp16, which has more mantissa bits than bf16; weights are within its range.
        data, highest, _ = functional.int8_vectorwise_quant(weight.half())
        return {"data": data, "scale": highest[:, None] / 127}
    data, state = functional.quantize_4bit(weight, blocksize=_NF4_BLOCK, quant_type="nf4")
    return {"data": data.reshape(-1), "absmax": state.absmax}


_QUANTIZERS = {"optimum.quanto": _with_quanto, "torchao": _with_torchao, "bitsandbytes": _with_bitsandbytes}


def _nested(absmax: Float[Tensor, " blocks"]) -> dict[str, Tensor]:
    """The scales of nf4 in 8 bits (double quantization, Dettmers et al., arXiv 2305.14314)."""
    from bitsandbytes import functional

    offset = absmax.mean().reshape(1)
    scale, state = functional.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
    return {"scale": scale, "nested": state.absmax, "offset": offset, "code": state.code}


def _grouped(data: Tensor, sides: Mapping[str, Tensor], rows: int, bits: int) -> dict[str, Tensor]:
    """Pack numbers of `bits` each into bytes, the first in the lowest bits. Reshape `sides`, one value per group."""
    parts = data.reshape(rows, -1, 8 // bits).unbind(-1)
    packed_data = parts[0].clone()
    for index, part in enumerate(parts[1:], start=1):
        packed_data |= part << bits * index
    return {"data": packed_data, **{name: side.reshape(rows, -1, 1) for name, side in sides.items()}}


def library_version(precision: str) -> str:
    """Version of the library that makes `precision`."""
    return version(PRECISIONS[precision].distribution)


def check_precision(precision: str, device: torch.device, option: str) -> None:
    """Raise a ConfigError if `device` cannot run `precision`. Call it before anything is loaded."""
    if precision == NO_CHANGE:
        return
    if PRECISIONS[precision].needs_accelerator and device.type == "cpu":
        usable = [name for name, entry in PRECISIONS.items() if not entry.needs_accelerator]
        raise ConfigError.of(
            f"{option} = {precision} on a machine without a GPU, where torchao does not compute with it",
            join_names(usable),
            f"The nearest is {'int4-quanto' if PRECISIONS[precision].bits == 4 else 'fp8wo-torchao'}.",
        )
    if precision == "fp8-torchao" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise ConfigError.of(
                f"{option} = fp8-torchao on a GPU of compute capability {capability[0]}.{capability[1]}",
                "8.9 or more, which multiplies in 8 bits",
                "fp8wo-torchao takes the same memory and runs there.",
            )
