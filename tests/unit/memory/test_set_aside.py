"""Tensors that wait in host memory come back as they were."""

import pytest
import torch
from torch import nn

from simpletuner.memory import offload
from simpletuner.memory.precision import quantized

CPU = torch.device("cpu")


def test_tensors_set_aside_come_back_bit_for_bit_as_the_same_parameters_also_after_an_error() -> None:
    torch.manual_seed(0)
    plain, packed = nn.Linear(32, 32), quantized(nn.Linear(32, 32, bias=False), "int8-quanto")
    tensors = [*plain.parameters(), *packed.parameters(), torch.randn(4, 4).t()]
    before = [tensor.detach().clone() for tensor in tensors]
    places = [tensor.data_ptr() for tensor in tensors]

    def fail() -> None:
        with offload.moved_to_host(tensors, CPU):
            assert all(tensor.data_ptr() != place for tensor, place in zip(tensors, places, strict=True))
            assert torch.equal(tensors[0], before[0])  # an average is read where it waits
            raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        fail()
    assert all(torch.equal(now, was) for now, was in zip(tensors, before, strict=True))
    assert all(now.stride() == was.stride() for now, was in zip(tensors, before, strict=True))
    assert plain.weight is tensors[0]


def test_streamed_tensors_are_not_set_aside() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    offload.install(model, offload.block_groups(list(model)), device=CPU)
    x = torch.randn(2, 8)
    before = model(x)
    with offload.moved_to_host(list(model.parameters()), CPU):
        pass
    assert torch.equal(model(x), before)
