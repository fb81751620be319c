"""Measure torch's attention kernels at FLUX.2's shapes, forward alone and with the backward pass.

    python benchmarks/gpu/attention.py [--device cpu --tiny]

A forward pass counts 4·tokens²·width operations, a backward pass twice that. Scores that a kernel computes again do not
count, so kernels compare by time. The first row of a shape is torch's own choice of kernel.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from measuring import Clock, parser, seconds_of
from results import report
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = {"dev": (1, 48, 4608, 128), "klein-9b": (1, 32, 4608, 128), "klein-4b": (1, 24, 4608, 128)}
TINY = {"dev": (1, 4, 80, 32)}
KERNELS = (None, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
ROUNDS, CALLS = 10, 5


def main() -> None:
    arguments = parser(__doc__).parse_args()
    clock = Clock(arguments.seconds)
    for shape in (TINY if arguments.tiny else SHAPES).values():
        for kernel in KERNELS:
            if clock.left < 2:
                return
            report("attention", shape=", ".join(map(str, shape)), **measured(shape, kernel, arguments.device))


def measured(shape: tuple[int, int, int, int], kernel: SDPBackend | None, device: torch.device) -> dict[str, object]:
    """Times and rates of one kernel; None is torch's own choice. For a kernel that fails, a note."""
    query, key, value, gradient = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    for tensor in (query, key, value):
        tensor.requires_grad_()
    name = "torch's choice" if kernel is None else kernel.name

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(query, key, value)

    def both() -> None:
        F.scaled_dot_product_attention(query, key, value).backward(gradient)

    try:
        with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
            time_of = functools.partial(seconds_of, device=device, rounds=ROUNDS, calls=CALLS)
            forward_s, both_s = time_of(forward), time_of(both)
    except RuntimeError as error:
        return {"kernel": name, "note": str(error).splitlines()[0][:120]}
    batch, heads, tokens, width = shape
    flop = 4 * batch * heads * tokens**2 * width
    return {
        "kernel": name,
        "forward_ms": 1e3 * forward_s,
        "both_ms": 1e3 * both_s,
        "forward_flop_per_s": flop / forward_s,
        "both_flop_per_s": 3 * flop / both_s,
    }


if __name__ == "__main__":
    main()
