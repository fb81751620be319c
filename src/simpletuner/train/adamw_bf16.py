"""AdamW with moments in bf16 and stochastic rounding."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpletuner.base.draws import draw_seed

CPU_CHUNK, GPU_CHUNK = 2**16, 2**22
"""Elements updated together: few enough for a CPU's cache, and enough to keep a GPU's kernel launches few."""

ELEMENT_BYTES = 44
"""Maximum temporary memory per element of a chunk, in bytes."""


@dataclass(frozen=True)
class _Piece:
    """Elements `start` to `stop` of a parameter, in row-major order."""

    parameter: Tensor
    seed: int
    """Seed of the parameter's random bits in this step."""
    start: int
    stop: int
    offset: int
    """Index of the parameter's first element in the whole tensor; above 0 only for a shard, the rows of a later rank.
    """

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the piece's elements in `tensor`, which has the parameter's shape. If `tensor` is not contiguous,
        the piece is all of it.
        """
        return tensor.view(-1)[self.start : self.stop] if tensor.is_contiguous() else tensor


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that stores its two moments in bf16: 4 bytes per parameter instead of 8.

    All arithmetic is fp32; bf16 values are stored with stochastic rounding. Rounding to nearest would freeze the second
    moment: with beta2 = 0.999 a step changes it by at most a thousandth, but bf16 only resolves one part in 256.
    Parameters keep their dtype: fp32 ones, such as adapters, are updated exactly; bf16 ones are rounded
    stochastically.

    The random bits of an element depend only on (`seed`, step, tensor, element index) and are the same on every device.
    So a resumed run rounds like an uninterrupted one, and all ranks round alike, with whole tensors or with shards of
    rows.

    Parameters are updated in chunks: small ones together, large ones in pieces. So neither the number of kernels nor
    the temporary memory (`ELEMENT_BYTES` per element of a chunk) grows with the number or size of tensors. A parameter
    that is not contiguous is never split.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self.first_elements: Mapping[Tensor, int] = {}
        """For parameters that are one rank's rows of a sharded tensor: the index of their first element in it."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  torch's signature
        """Step all parameters that have a gradient."""
        index = 0
        for group in self.param_groups:
            pieces_by_kind: dict[tuple[object, ...], list[_Piece]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    pieces = self._pieces(parameter, index)
                    step = self.state[parameter]["step"]
                    key = (parameter.device, parameter.dtype, parameter.grad.dtype, step)
                    pieces_by_kind.setdefault(key, []).extend(pieces)
                index += 1
            for pieces in pieces_by_kind.values():
                for chunk in _chunks(pieces):
                    self._update(chunk, group)

    @torch.no_grad()
    def step_parameter(
        self, parameter: Tensor, group: dict[str, Any], index: int, is_finite: Tensor | None = None
    ) -> None:
        """Update `parameter` of `group` with its gradient. `index`, its position among all parameters, keys the random
        bits. If `is_finite` is given and false, only the step count changes.
        """
        for chunk in _chunks(self._pieces(parameter, index)):
            self._update(chunk, group, is_finite)

    def _pieces(self, parameter: Tensor, index: int) -> list[_Piece]:
        """Increment the step count of `parameter` and split it into pieces."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        seed = draw_seed(self.seed, "rounding", state["step"], index)
        count = parameter.numel()
        size = chunk_size(parameter) if parameter.is_contiguous() else count
        offset = self.first_elements.get(parameter, 0)
        return [
            _Piece(parameter, seed, start, min(start + size, count), offset) for start in range(0, count, max(size, 1))
        ]

    def _update(self, pieces: Sequence[_Piece], group: dict[str, Any], is_finite: Tensor | None = None) -> None:
        """Update pieces that share a step count, dtype and device, unless `is_finite` is given and false."""
        step, (beta1, beta2), lr = self.state[pieces[0].parameter]["step"], group["betas"], group["lr"]
        parameters = [piece.of(piece.parameter) for piece in pieces]
        first_moments = [piece.of(self.state[piece.parameter]["exp_avg"]) for piece in pieces]
        second_moments = [piece.of(self.state[piece.parameter]["exp_avg_sq"]) for piece in pieces]
        gradient = _joined([piece.of(piece.parameter.grad) for piece in pieces])  # type: ignore[arg-type]
        first_moment = _joined(first_moments).lerp_(gradient, 1 - beta1)
        second_moment = _joined(second_moments).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        del gradient
        denominator = second_moment.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        updated = (
            _joined(parameters)
            .mul_(1 - lr * group["weight_decay"])
            .addcdiv_(first_moment, denominator, value=-lr / (1 - beta1**step))
        )
        del denominator

        bits = noise_bits(
            [(piece.seed, piece.offset + piece.start, piece.offset + piece.stop) for piece in pieces], updated.device
        )
        _scatter(stochastically_rounded(first_moment, bits), first_moments, is_finite)
        _scatter(stochastically_rounded(second_moment, bits >> 16), second_moments, is_finite)
        if parameters[0].dtype == torch.bfloat16:
            updated = stochastically_rounded(updated, bits >> 32)
        _scatter(updated, parameters, is_finite)


def chunk_size(parameter: Tensor) -> int:
    """Elements updated together on the parameter's device."""
    return CPU_CHUNK if parameter.device.type == "cpu" else GPU_CHUNK


def _chunks(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Group `pieces`, which are on one device, into chunks of at most `chunk_size` elements. A larger piece is a chunk
    by itself.
    """
    chunk: list[_Piece] = []
    count = 0
    for piece in pieces:
        if chunk and count + len(piece) > chunk_size(piece.parameter):
            yield chunk
            chunk, count = [], 0
        chunk.append(piece)
        count += len(piece)
    if chunk:
        yield chunk


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of `tensors`, copied into one fp32 vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).float()


def _scatter(vector: Tensor, targets: Sequence[Tensor], is_finite: Tensor | None) -> None:
    """Copy `vector` back into the tensors that `_joined` made it from, unless `is_finite` is given and false."""
    if is_finite is not None:
        vector = torch.where(is_finite, vector, _joined(targets).to(vector.dtype))
    parts = vector.split([target.numel() for target in targets])
    torch._foreach_copy_(list(targets), [part.view_as(target) for part, target in zip(parts, targets, strict=True)])


def noise_bits(pieces: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """64 random bits for each element of `pieces`, as one int64 vector.

    A piece is (seed, start, stop): outputs start to stop of the SplitMix64 sequence of that seed (Steele, Lea and Flood
    2014).
    """
    sizes = [stop - start for _, start, stop in pieces]
    z = torch.arange(1, sum(sizes) + 1, device=device).mul_(_signed(_GOLDEN))
    position, offsets = 0, []
    for (seed, start, _), size in zip(pieces, sizes, strict=True):
        offsets.append(_signed((seed + (start - position) * _GOLDEN) % 2**64))
        position += size
    torch._foreach_add_(list(z.split(sizes)), offsets)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        z.bitwise_xor_(_shifted(z, shift)).mul_(_signed(factor))
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, bits: int) -> Tensor:
    """`z >> bits` for unsigned numbers; torch's shift of int64 extends the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def stochastically_rounded(values: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 `values` to bf16 stochastically: add the lowest 16 of `bits` to the 16 mantissa bits that bf16 lacks,
    then truncate. Values that bf16 represents exactly do not change.
    """
    sums = (bits & 0xFFFF).to(torch.int32).add_(values.view(torch.int32))
    return sums.bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)
