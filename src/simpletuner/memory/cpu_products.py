"""Fast bf16 products on CPUs without bf16 instructions.

Without AVX-512 torch multiplies bf16 on a CPU one element at a time: products take up to 60 times as long as in fp32,
convolutions 95 times (docs/log.md, 2026-11-29). Most desktop CPUs have no AVX-512. This module replaces torch's bf16
products with fp32 products that are rounded once at the end, as oneDNN computes them on CPUs with AVX-512. fp32
products stay bit-identical.
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
    """Whether torch's own bf16 products are fast on this CPU. Assumed on architectures other than x86."""
    return platform.machine().lower() not in _X86 or "AVX512" in torch.backends.cpu.get_cpu_capability()


@functools.cache
def multiply_bf16_in_fp32() -> torch.library.Library | None:
    """Replace torch's bf16 products and convolutions in this process, if the CPU needs it; returns None if it does not.

    Products in compiled code and in torch's own attention are not replaced.
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
        warnings.simplefilter("ignore")  # about overriding a kernel
        for name, kernel in replaced.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    return library


def _in_fp32(kernel: Callable[..., Tensor], out: str) -> Callable[..., Tensor]:
    """Wrap `kernel`, the variant of an operator that writes to its argument named `out`: return the result instead.

    bf16 arguments are computed in fp32, and the result is rounded to bf16.

    The out variant itself is not replaced, so this does not recurse.
    """

    def compute(*arguments: Any, **options: Any) -> Tensor:
        first: Tensor = arguments[0]
        if first.dtype != torch.bfloat16:
            return kernel(*arguments, **options, **{out: first.new_empty(0)})
        fp32_arguments = [each.float() if isinstance(each, Tensor) else each for each in arguments]
        return kernel(*fp32_arguments, **options, **{out: fp32_arguments[0].new_empty(0)}).bfloat16()

    return compute
