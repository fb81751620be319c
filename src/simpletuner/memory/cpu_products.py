"""Products of bf16 numbers on CPUs that cannot multiply them.

Without AVX-512 torch multiplies bf16 on a CPU one element at a time: products take up to 60 times as long as in fp32,
convolutions 95 times (docs/log.md, 2026-11-29). Most desktop CPUs are such. Here torch's products in bf16 are replaced
by products in fp32 that are rounded once at the end, as oneDNN computes them where the CPU can. fp32 is left as it is,
bit for bit.
"""

import functools
import platform
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_X86 = ("x86_64", "amd64")


def multiplies_bf16() -> bool:
    """Whether torch's own products of bf16 numbers are fast on this CPU. Of other architectures than x86 nothing is
    known that would be slow.
    """
    return platform.machine().lower() not in _X86 or "AVX512" in torch.backends.cpu.get_cpu_capability()


@functools.cache
def multiply_bf16_in_fp32() -> torch.library.Library | None:
    """Replace torch's products and convolutions of bf16 numbers, for this process, where the CPU needs it. None where
    it does not. Products inside compiled code and in torch's own attention stay as they are.
    """
    if multiplies_bf16():
        return None
    aten = torch.ops.aten
    replaced = {
        "mm": _in_fp32(aten.mm.out, "out"),
        "addmm": _in_fp32(aten.addmm.out, "out"),
        "bmm": _in_fp32(aten.bmm.out, "out"),
        "baddbmm": _in_fp32(aten.baddbmm.out, "out"),
        "_slow_conv2d_forward": _in_fp32(aten._slow_conv2d_forward.output, "output"),
    }
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was a kernel before
        for name, kernel in replaced.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    return library


def _in_fp32(kernel: Callable[..., Tensor], out: str) -> Callable[..., Tensor]:
    """`kernel`, the variant of an operator that writes to its argument `out` and is not replaced, as one that returns
    its result, in the dtype of the factors.
    """

    def compute(*arguments: Any, **options: Any) -> Tensor:
        first: Tensor = arguments[0]
        if first.dtype != torch.bfloat16:
            return kernel(*arguments, **options, **{out: first.new_empty(0)})
        whole = [each.float() if isinstance(each, Tensor) else each for each in arguments]
        return kernel(*whole, **options, **{out: whole[0].new_empty(0)}).bfloat16()

    return compute
