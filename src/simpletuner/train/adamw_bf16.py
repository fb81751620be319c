"""AdamW that keeps its memory in bf16, rounded by chance."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from simpletuner.base.draws import draw_seed


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose two moments are stored in bf16: 4 bytes a parameter instead of 8.

    All arithmetic is fp32; what is stored in bf16 is rounded up or down by chance, in proportion to what is nearer. To
    the nearest alone, the second moment would stand still: with beta2 = 0.999 a step moves it by at most a thousandth,
    and bf16 tells numbers apart from one in 256 on. Parameters keep their own type: fp32 ones, as adapters
    are, exactly; bf16 ones are rounded by chance as well.

    An element's draw is a function of (`seed`, step, tensor, place) and the same on every device, so a resumed run
    rounds as an uninterrupted one does, and so does every rank.
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

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  torch's signature
        """One step on the gradients that are there."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, place)
                place += 1

    def _update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        step, (beta1, beta2), lr = state["step"], group["betas"], group["lr"]
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        first = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        updated = (
            parameter.float().mul(1 - lr * group["weight_decay"]).addcdiv_(first, root, value=-lr / (1 - beta1**step))
        )

        bits = noise_bits(parameter, draw_seed(self.seed, "rounding", step, place))
        state["exp_avg"].copy_(rounded(first, bits))
        state["exp_avg_sq"].copy_(rounded(second, bits >> 16))
        parameter.copy_(rounded(updated, bits >> 32) if parameter.dtype == torch.bfloat16 else updated)


def noise_bits(like: Tensor, seed: int) -> Tensor:
    """64 random bits for each element of `like`: the `seed`-th stream of SplitMix64 (Steele, Lea and Flood 2014)."""
    z = torch.arange(1, like.numel() + 1, device=like.device).mul_(_GOLDEN).add_(seed)
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return (z ^ _shifted(z, 31)).view_as(like)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """`z >> bits` of an unsigned number; torch's int64 drags its sign along."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


_GOLDEN, _MIX_1, _MIX_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 `values` in bf16, up or down by chance: the lowest 16 of `bits` are added below bf16's last place, and what
    is below is cut off. What bf16 can hold stays as it is.
    """
    whole = values.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    return (whole & -0x10000).view(torch.float32).to(torch.bfloat16)
