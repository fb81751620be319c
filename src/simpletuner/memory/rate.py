"""How fast a device multiplies matrices."""

import time

import torch

MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the square matrices: large enough that nothing but the product counts."""
LONG_ENOUGH_S = 0.2


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of products of `dtype` on `device`, measured; takes about half a second."""
    side = MATRIX_SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=torch.float32).to(dtype)

    def seconds(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds(1)  # sets up what the first product needs
    times = 1
    while (took := seconds(times)) < LONG_ENOUGH_S:
        times *= 2
    return 2 * side**3 * times / took
