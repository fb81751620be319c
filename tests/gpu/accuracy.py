"""How exact a result is, and whether the device's is as exact as the CPU's.

Tolerances are measured, not chosen: the same computation is made in fp64 on the CPU, then in the tested type on the CPU
and on the device. Both round as often; they add in another order and their kernels differ. So the device's distance
from the exact result may be a small multiple of the CPU's.

fp32: 8. Memory-efficient attention multiplies fp32 in three passes of TF32, which rounds a little more than fp32 does.
One pass of TF32 keeps 10 bits of 23 and would be off by a factor in the hundreds.
bf16: 2. A kernel may round attention weights to bf16 where the CPU keeps them in fp32. (Attention whose scores are bf16
too was off by 1.2 to 1.9 times the distance of torch's CPU kernel: these bounds find coarse arithmetic, not that.)
"""

from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

FACTORS = {torch.float32: 8.0, torch.bfloat16: 2.0}


def distance(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖, in fp64. Not a number, or infinite, where `found` is."""
    difference = found.detach().to("cpu", torch.float64) - exact.to(torch.float64)
    return float(difference.norm() / exact.norm())


def assert_as_exact(
    found: Mapping[str, Tensor], on_cpu: Mapping[str, Tensor], exact: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Each result is as near to the exact one as the CPU's, but for the factor of `dtype`.

    Where the CPU's was lucky, its usual distance counts: the median over all results; and the rounding of one number.
    """
    assert found.keys() == on_cpu.keys() == exact.keys()
    usual = {name: distance(on_cpu[name], exact[name]) for name in exact}
    middle = max(median(usual.values()), torch.finfo(torch.float32).eps)
    allowed = {name: FACTORS[dtype] * max(value, middle) for name, value in usual.items()}
    reached = {name: distance(found[name], exact[name]) for name in exact}
    wrong = {name: (value, allowed[name]) for name, value in reached.items() if not value <= allowed[name]}
    assert not wrong, f"of {len(exact)} results, further from the exact one than allowed: {wrong}"
