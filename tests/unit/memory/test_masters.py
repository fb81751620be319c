"""Masters see the steps that bf16 weights cannot."""

import pytest
import torch
from torch import nn

from simpletuner.base.errors import ConfigError
from simpletuner.memory.masters import Masters


def linear() -> nn.Linear:
    layer = nn.Linear(3, 2, bias=False)
    nn.init.ones_(layer.weight)
    return layer


def masters_of(layer: nn.Linear) -> Masters:
    return Masters(dict(layer.named_parameters()), torch.bfloat16)


def test_steps_below_the_spacing_of_bf16_add_up() -> None:
    layer = linear()
    masters = masters_of(layer)
    optimizer = torch.optim.SGD(masters.parameters.values(), lr=1e-3)  # beside 1, bf16 sees no step below 0.004
    alone = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    coarse = torch.optim.SGD([alone], lr=1e-3)
    for _ in range(10):
        layer.weight.grad = torch.ones(2, 3, dtype=torch.bfloat16)
        alone.grad = torch.ones(2, 3, dtype=torch.bfloat16)
        masters.take_gradients()
        optimizer.step()
        optimizer.zero_grad()
        masters.update_weights()
        coarse.step()
    assert torch.equal(alone, torch.ones(2, 3, dtype=torch.bfloat16))
    torch.testing.assert_close(masters.parameters["weight"].detach(), torch.full((2, 3), 0.99))
    assert torch.equal(layer.weight, masters.parameters["weight"].bfloat16())
    assert layer.weight.dtype == torch.bfloat16


def test_gradients_add_up_in_fp32() -> None:
    layer = linear()
    masters = masters_of(layer)
    for value in (256.0, 1.0, 1.0):  # in bf16, 256 + 1 is 256
        layer.weight.grad = torch.full((2, 3), value, dtype=torch.bfloat16)
        masters.take_gradients()
        assert layer.weight.grad is None
    masters.take_gradients()  # nothing new
    assert torch.equal(masters.parameters["weight"].grad, torch.full((2, 3), 258.0))  # type: ignore[arg-type]


def test_the_masters_are_the_fp32_weights_and_other_values_are_shown_for_a_while() -> None:
    layer = nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    masters = masters_of(layer)
    assert torch.equal(masters.parameters["weight"], before)
    masters.show({"weight": torch.full((2, 3), 2.0)})
    assert torch.equal(layer.weight, torch.full((2, 3), 2.0, dtype=torch.bfloat16))
    masters.update_weights()
    assert torch.equal(layer.weight, before.bfloat16())
    assert torch.equal(masters.parameters["weight"], before)


def test_masters_of_anything_but_fp32_would_have_lost_already() -> None:
    with pytest.raises(TypeError, match="fp32"):
        masters_of(linear().bfloat16())


def test_a_weight_beyond_fp16_is_named() -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[1, 2] = -70_000.0
    with pytest.raises(ConfigError, match=r"the weight weight has a value of 70000: expected at most 65504\."):
        Masters(dict(layer.named_parameters()), torch.float16)
