"""Measure how fast a device multiplies matrices."""

import time

import torch

MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
"""Side of the square matrices by device type; large enough that overhead does not count."""
LONG_ENOUGH_S = 0.2
"""Minimum duration of the measurement in seconds."""


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of matrix products in `dtype` on `device`. Takes about half a second."""
    side = MATRIX_SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=torch.float32).to(dtype)

    def seconds(times: int) -> float:
        started_at = time.perf_counter()
        for _ in range(times):
            matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started_at

    seconds(1)  # warm-up
    times = 1
    while (elapsed := seconds(times)) < LONG_ENOUGH_S:
        times *= 2
    return 2 * side**3 * times / elapsed
