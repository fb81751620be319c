from typing import Any

import pytest
import torch

from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flow.loss import Penalty, averaged, flow_loss, huber, huber_scale, smooth_l1, squared
from simpletuner.flow.path import noised, velocity


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LATENTS, NOISE = normal(2, 8, 4, 6), normal(2, 8, 4, 6, seed=1)
CONDITION = Condition.at(TextContext.dense(normal(2, 5, 3, seed=2)), 1.0)


def test_the_path_starts_at_the_data_and_ends_at_the_noise() -> None:
    assert torch.equal(noised(LATENTS, NOISE, torch.zeros(2)), LATENTS)
    assert torch.equal(noised(LATENTS, NOISE, torch.ones(2)), NOISE)


def test_each_sample_has_its_own_sigma() -> None:
    mixed = noised(LATENTS, NOISE, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], LATENTS[0])
    assert torch.equal(mixed[1], NOISE[1])


def test_the_velocity_is_the_derivative_of_the_path() -> None:
    step = noised(LATENTS, NOISE, torch.full((2,), 0.75)) - noised(LATENTS, NOISE, torch.full((2,), 0.25))
    torch.testing.assert_close(step / 0.5, velocity(LATENTS, NOISE))


def test_a_perfect_prediction_costs_nothing() -> None:
    loss = flow_loss(
        lambda x, sigma, condition: NOISE - LATENTS,
        LATENTS, CONDITION, sigma=torch.tensor([0.2, 0.9]), noise=NOISE,
    )  # fmt: skip
    assert torch.equal(loss, torch.zeros(2))


def test_a_zero_prediction_costs_the_mean_square_of_the_velocity_of_each_sample() -> None:
    loss = flow_loss(
        lambda x, sigma, condition: torch.zeros_like(x),
        LATENTS, CONDITION, sigma=torch.tensor([0.2, 0.9]), noise=NOISE,
    )  # fmt: skip
    torch.testing.assert_close(loss, (NOISE - LATENTS).square().flatten(1).mean(1))


def test_the_loss_is_fp32_over_a_bf16_model() -> None:
    loss = flow_loss(
        lambda x, sigma, condition: x.bfloat16(),
        LATENTS, CONDITION, sigma=torch.tensor([0.2, 0.9]), noise=NOISE,
    )  # fmt: skip
    assert loss.dtype == torch.float32


def test_a_weight_of_ones_changes_no_bit_of_loss_and_gradient() -> None:
    found = []
    for weight in (None, torch.ones(2, 4, 6)):
        penalties = (NOISE - LATENTS).square().requires_grad_()
        losses = averaged(penalties, weight)
        losses.sum().backward()
        assert penalties.grad is not None
        found.append((losses.detach(), penalties.grad))
    (plain, gradient), (ones, ones_gradient) = found
    assert torch.equal(plain, ones)
    assert torch.equal(gradient, ones_gradient)


def test_a_weight_averages_over_what_it_marks() -> None:
    penalties = (NOISE - LATENTS).square()
    weight = torch.zeros(2, 4, 6)
    weight[0, 1:3, 2:5] = 1
    weight[1, 0, 0], weight[1, 3, 5] = 1, 3
    found = averaged(penalties, weight)
    torch.testing.assert_close(found[0], penalties[0, :, 1:3, 2:5].mean())
    torch.testing.assert_close(found[1], (penalties[1, :, 0, 0].mean() + 3 * penalties[1, :, 3, 5].mean()) / 4)
    torch.testing.assert_close(averaged(penalties, 7 * weight), found)


@pytest.mark.parametrize(
    "penalty", [squared, huber(0.1, "snr"), smooth_l1(0.1, "snr")], ids=["l2", "huber", "smooth_l1"]
)
def test_the_prediction_has_no_gradient_where_the_weight_is_zero(penalty: Penalty) -> None:
    prediction = normal(2, 8, 4, 6, seed=3).requires_grad_()
    weight = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(4))
    weight[0, :2], weight[1, :, 3:] = 0, 0
    options: dict[str, Any] = {"sigma": torch.tensor([0.2, 0.9]), "noise": NOISE, "penalty": penalty, "weight": weight}
    flow_loss(lambda x, sigma, condition: prediction, LATENTS, CONDITION, **options).sum().backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad.ne(0).any(1), weight > 0)


@pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
def test_huber_is_quadratic_for_small_errors_and_linear_for_large_ones(schedule: str) -> None:
    sigma = torch.tensor([0.3])
    c = huber_scale(sigma, 0.1, schedule).item()  # type: ignore[arg-type]
    small, large = torch.full((1, 1, 1, 1), 1e-3), torch.full((1, 1, 1, 1), 1e3)
    penalty, flat = huber(0.1, schedule), smooth_l1(0.1, schedule)  # type: ignore[arg-type]
    assert penalty(small, sigma).item() == pytest.approx(1e-6, rel=2e-2)
    assert penalty(large, sigma).item() == pytest.approx(2 * c * 1e3, rel=1e-3)
    assert flat(small, sigma).item() == pytest.approx(1e-6 / c, rel=2e-2)
    assert flat(large, sigma).item() == pytest.approx(2e3, rel=1e-3)


def test_huber_schedules_run_from_one_at_the_data_to_c_at_the_noise() -> None:
    ends = torch.tensor([0.0, 1.0])
    for schedule in ("snr", "exponential"):
        torch.testing.assert_close(huber_scale(ends, 0.1, schedule), torch.tensor([1.0, 0.1]))  # type: ignore[arg-type]
    assert torch.equal(huber_scale(ends, 0.1, "constant"), torch.full((2,), 0.1))


def test_squared_ignores_sigma() -> None:
    error = normal(1, 2, 2, 2)
    assert torch.equal(squared(error, torch.zeros(1)), squared(error, torch.ones(1)))
