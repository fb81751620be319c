"""AdamW that keeps its memory in bf16, rounded by chance."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpletuner.base.draws import draw_seed

CPU_CHUNK, GPU_CHUNK = 2**16, 2**22
"""Elements updated together: few enough for a CPU's cache, enough for few launches on a GPU."""

ELEMENT_BYTES = 44
"""Temporary memory for each element of a chunk, at most."""


@dataclass(frozen=True)
class _Piece:
    """Elements `start` to `stop` of a parameter, in row-major order."""

    parameter: Tensor
    seed: int
    """Of the parameter's draws in this step."""
    start: int
    stop: int
    first: int
    """Place of the parameter's first element in the whole tensor, whose rows it is on one rank."""

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of `tensor`, which has the parameter's shape. Not a copy: only contiguous tensors are cut."""
        return tensor.view(-1)[self.start : self.stop] if tensor.is_contiguous() else tensor


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose two moments are stored in bf16: 4 bytes a parameter instead of 8.

    All arithmetic is fp32; what is stored in bf16 is rounded up or down by chance, in proportion to what is nearer. To
    the nearest alone, the second moment would stand still: with beta2 = 0.999 a step moves it by at most a thousandth,
    and bf16 tells numbers apart from one in 256 on. Parameters keep their own type: fp32 ones, as adapters
    are, exactly; bf16 ones are rounded by chance as well.

    An element's draw is a function of (`seed`, step, tensor, place) and the same on every device, so a resumed run
    rounds as an uninterrupted one does, and so does every rank, with whole tensors or with its rows of them.

    Parameters are updated in chunks, small ones together and large ones in pieces, so neither the number of kernels
    nor the temporary memory (a chunk of `ELEMENT_BYTES` each) grows with the number or the size of tensors. A
    parameter that is not contiguous is never cut.
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
        """Of parameters that are one rank's rows of a sharded tensor: the place of their first element in it."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  torch's signature
        """One step on the gradients that are there."""
        place = 0
        for group in self.param_groups:
            alike: dict[tuple[object, ...], list[_Piece]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    pieces = self._pieces(parameter, place)
                    step = self.state[parameter]["step"]
                    alike.setdefault((parameter.device, parameter.dtype, parameter.grad.dtype, step), []).extend(pieces)
                place += 1
            for pieces in alike.values():
                for chunk in _chunks(pieces):
                    self._update(chunk, group)

    @torch.no_grad()
    def step_parameter(
        self, parameter: Tensor, group: dict[str, Any], place: int, is_finite: Tensor | None = None
    ) -> None:
        """Step one parameter of `group`, the `place`-th of all, on its gradient. Where `is_finite` is false, only the
        count of its steps changes.
        """
        for chunk in _chunks(self._pieces(parameter, place)):
            self._update(chunk, group, is_finite)

    def _pieces(self, parameter: Tensor, place: int) -> list[_Piece]:
        """Count a step of `parameter` and cut it."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        seed = draw_seed(self.seed, "rounding", state["step"], place)
        count = parameter.numel()
        size = chunk_size(parameter) if parameter.is_contiguous() else count
        first = self.first_elements.get(parameter, 0)
        return [
            _Piece(parameter, seed, start, min(start + size, count), first) for start in range(0, count, max(size, 1))
        ]

    def _update(self, pieces: Sequence[_Piece], group: dict[str, Any], is_finite: Tensor | None = None) -> None:
        """Update pieces of one step, dtype and device, unless `is_finite` is given and false."""
        step, (beta1, beta2), lr = self.state[pieces[0].parameter]["step"], group["betas"], group["lr"]
        parameters = [piece.of(piece.parameter) for piece in pieces]
        firsts = [piece.of(self.state[piece.parameter]["exp_avg"]) for piece in pieces]
        seconds = [piece.of(self.state[piece.parameter]["exp_avg_sq"]) for piece in pieces]
        gradient = _joined([piece.of(piece.parameter.grad) for piece in pieces])  # type: ignore[arg-type]
        first = _joined(firsts).lerp_(gradient, 1 - beta1)
        second = _joined(seconds).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        del gradient
        root = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        updated = (
            _joined(parameters)
            .mul_(1 - lr * group["weight_decay"])
            .addcdiv_(first, root, value=-lr / (1 - beta1**step))
        )
        del root

        bits = noise_bits(
            [(piece.seed, piece.first + piece.start, piece.first + piece.stop) for piece in pieces], updated.device
        )
        _spread(rounded(first, bits), firsts, is_finite)
        _spread(rounded(second, bits >> 16), seconds, is_finite)
        if parameters[0].dtype == torch.bfloat16:
            updated = rounded(updated, bits >> 32)
        _spread(updated, parameters, is_finite)


def chunk_size(parameter: Tensor) -> int:
    """Elements updated together on the parameter's device."""
    return CPU_CHUNK if parameter.device.type == "cpu" else GPU_CHUNK


def _chunks(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """`pieces` of one device, as many together as a chunk has room for."""
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
    """A copy of all elements in one row, fp32."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).float()


def _spread(row: Tensor, targets: Sequence[Tensor], is_wanted: Tensor | None) -> None:
    """Copy a row of all elements into the tensors that it was joined from, unless `is_wanted` is given and false."""
    if is_wanted is not None:
        row = torch.where(is_wanted, row, _joined(targets).to(row.dtype))
    parts = row.split([target.numel() for target in targets])
    torch._foreach_copy_(list(targets), [part.view_as(target) for part, target in zip(parts, targets, strict=True)])


def noise_bits(pieces: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """64 random bits for each element of `pieces`, in one row.

    A piece is (seed, start, stop): outputs start to stop of that seed's stream of SplitMix64 (Steele, Lea and Flood
    2014).
    """
    sizes = [stop - start for _, start, stop in pieces]
    z = torch.arange(1, sum(sizes) + 1, device=device).mul_(_signed(_GOLDEN))
    at, offsets = 0, []
    for (seed, start, _), size in zip(pieces, sizes, strict=True):
        offsets.append(_signed((seed + (start - at) * _GOLDEN) % 2**64))
        at += size
    torch._foreach_add_(list(z.split(sizes)), offsets)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        z.bitwise_xor_(_shifted(z, shift)).mul_(_signed(factor))
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, bits: int) -> Tensor:
    """`z >> bits` of an unsigned number; torch's int64 drags its sign along."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 `values` in bf16, up or down by chance: the lowest 16 of `bits` are added below bf16's last place, and what
    is below is cut off. What bf16 can hold stays as it is.
    """
    whole = (bits & 0xFFFF).to(torch.int32).add_(values.view(torch.int32))
    return whole.bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)
