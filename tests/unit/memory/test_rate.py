"""How fast a device multiplies: more than nothing, and the same kind of number twice."""

import torch

from simpletuner.memory.rate import matmul_rate


def test_a_rate_is_measured() -> None:
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14
