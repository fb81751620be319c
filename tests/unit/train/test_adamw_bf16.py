"""AdamW with bf16 memory: unbiased where rounding to the nearest stands still."""

import pytest
import torch
from torch import nn

from simpletuner.train.adamw_bf16 import AdamWBf16, noise_bits, rounded


def test_what_bf16_holds_stays() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-126, 3.0e38, float("inf")]).to(torch.bfloat16)
    assert torch.equal(rounded(exact.float(), noise_bits(exact, 5)).view(torch.int16), exact.view(torch.int16))


def test_rounding_is_up_or_down_in_proportion() -> None:
    value = torch.full((200_000,), 1 + 2**-7 * 0.25)  # a quarter of the way from 1 to the next number
    for values in (value, -value):
        found = rounded(values, noise_bits(values, 1)).float()
        assert set(found.abs().tolist()) == {1.0, 1 + 2**-7}
        assert found.mean().item() == pytest.approx(values[0].item(), abs=2**-7 * 0.004)


def test_the_draw_is_splitmix64s() -> None:
    """The first outputs of the published generator for the seed 1234567."""
    found = noise_bits(torch.empty(3), 1234567).tolist()
    assert [value % 2**64 for value in found] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_second_moment_moves_where_the_nearest_number_would_hold_it() -> None:
    parameter = nn.Parameter(torch.zeros(4096))
    optimiser = AdamWBf16([parameter], lr=0.0)
    parameter.grad = torch.ones(4096)
    optimiser.step()
    optimiser.state[parameter]["exp_avg_sq"].fill_(2.0)  # far above what the gradients give
    nearest = optimiser.state[parameter]["exp_avg_sq"].clone()
    for _ in range(200):
        optimiser.step()
        nearest = (nearest.float() * 0.999 + 0.001).to(torch.bfloat16)
    expected = 1 + 0.999**200
    assert optimiser.state[parameter]["exp_avg_sq"].float().mean().item() == pytest.approx(expected, rel=0.005)
    assert nearest[0].item() == 2.0


def test_it_learns_as_adamw_does() -> None:
    """To 2 %: a moment in bf16 is right to 1/256, and errors average out."""
    ours, theirs = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(64, 64))
    optimisers = AdamWBf16([ours], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2)
    for step in range(50):
        gradient = torch.sin(torch.arange(4096.0) + step).view(64, 64) + 0.5
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimiser in optimisers:
            optimiser.step()
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.02


def test_bf16_parameters_move_by_less_than_their_last_place() -> None:
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimiser = AdamWBf16([parameter], lr=1e-4, weight_decay=0.0)
    for _ in range(50):
        parameter.grad = torch.ones_like(parameter)
        optimiser.step()
    assert parameter.dtype == torch.bfloat16
    assert parameter.float().mean().item() == pytest.approx(1 - 50 * 1e-4, abs=3e-4)


def test_tensors_steps_and_seeds_have_draws_of_their_own() -> None:
    def moments(seed: int) -> list[torch.Tensor]:
        parameters = [nn.Parameter(torch.zeros(4096)) for _ in range(2)]
        optimiser = AdamWBf16(parameters, seed=seed)
        for parameter in parameters:
            parameter.grad = torch.full((4096,), 0.3)
        optimiser.step()
        return [optimiser.state[parameter]["exp_avg"] for parameter in parameters]

    one, two = moments(0)
    assert not torch.equal(one, two)
    assert torch.equal(one, moments(0)[0])
    assert not torch.equal(one, moments(1)[0])
