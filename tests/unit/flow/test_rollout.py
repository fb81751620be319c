"""Rolled-out latents and their loss, where the right answer is known."""

import math
from typing import Any

import pytest
import torch
from einops import reduce
from torch import Tensor

from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flow.loss import flow_loss, huber, smooth_l1, squared
from simpletuner.flow.path import noised, velocity
from simpletuner.flow.rollout import (
    LONGEST_STEP,
    SOLVERS,
    Reflex,
    RolloutStarts,
    compensation,
    drift,
    rolled_out,
    rollout_loss,
)

B = 4


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (B, 6, 3, 5)), generator=torch.Generator().manual_seed(seed))


LATENTS, NOISE, CONTEXT = normal(0), normal(1), normal(2, B, 2, 3)
SIGMA, GUIDANCE = torch.tensor([0.2, 0.5, 0.97, 0.7]), torch.tensor([1.0, 2.0, 3.0, 4.0])
LENGTHS = torch.tensor([0.05, 0.0, 0.05, 0.013])
SOURCE = (SIGMA + LENGTHS).clamp(max=1)
CONDITION = Condition(TextContext.dense(CONTEXT), GUIDANCE)


class Model(torch.nn.Module):
    """A curved field that looks at everything it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(6, 6, bias=False)
        torch.nn.init.normal_(self.mix.weight, generator=torch.Generator().manual_seed(5))
        self.calls: list[tuple[int, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        context, guidance = condition.context.expanded(), condition.guidance
        self.calls.append((len(x), torch.is_grad_enabled()))
        with_context = x + (sigma + guidance / 4 + context.mean((1, 2)).to(x.dtype)).reshape(-1, 1, 1, 1)
        return torch.sin(self.mix(with_context.movedim(1, -1))).movedim(-1, 1)


def walked(model: Any, solver: str = "euler", steps: int = 3, source: Tensor = SOURCE) -> Tensor:
    return rolled_out(
        model, LATENTS, CONDITION, sigma=SIGMA, noise=NOISE, starts=RolloutStarts.at(source, SIGMA),
        solver=SOLVERS[solver], steps=steps,
    )  # fmt: skip


def test_the_euler_path_is_a_plain_loop_over_samples_in_float64() -> None:
    """To 1e-6 of the largest value: ours is fp32."""
    model, reference = Model(), Model().double()
    found = walked(model, steps=7)
    for index in range(B):
        x0, noise, context = (each[index : index + 1].double() for each in (LATENTS, NOISE, CONTEXT))
        here, target = SOURCE[index].item(), SIGMA[index].item()
        x = (1 - here) * x0 + here * noise
        step = (here - target) / 7
        for count in range(7):
            at = torch.tensor([here - count * step], dtype=torch.float64)
            x = x - step * reference(x, at, Condition(TextContext.dense(context), GUIDANCE[index : index + 1]))
        assert (found[index] - x[0]).abs().max() <= 1e-6 * x.abs().max()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_with_the_field_of_a_point_mass_the_rolled_out_latent_lies_on_the_path(solver: str, steps: int) -> None:
    def to_the_data(x: Tensor, sigma: Tensor, _condition: Condition) -> Tensor:
        moving = LENGTHS > 0
        return (x - LATENTS[moving]) / sigma.reshape(-1, 1, 1, 1)

    found = walked(to_the_data, solver, steps)
    torch.testing.assert_close(found, noised(LATENTS, NOISE, SIGMA), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_with_length_0_keeps_its_bits_and_takes_no_part(solver: str) -> None:
    model = Model()
    found = walked(model, solver)
    plain = noised(LATENTS, NOISE, SIGMA)
    assert torch.equal(found[1], plain[1])
    for index in (0, 2, 3):
        assert not torch.equal(found[index], plain[index])
    assert model.calls == [(3, False)] * (3 * SOLVERS[solver].calls_per_step)
    assert not found.requires_grad


def test_without_a_length_there_is_no_call() -> None:
    model = Model()
    assert torch.equal(walked(model, source=SIGMA), noised(LATENTS, NOISE, SIGMA))
    assert model.calls == []


def test_a_rollout_begins_at_most_at_the_noise() -> None:
    asked = []

    def still(x: Tensor, sigma: Tensor, _condition: Condition) -> Tensor:
        asked.append((x, sigma))
        return torch.zeros_like(x)

    walked(still, steps=1)
    x, sigma = asked[0]
    torch.testing.assert_close(sigma, torch.tensor([0.25, 1.0, 0.713]))
    assert torch.equal(x[1], NOISE[2])


def test_steps_are_no_longer_than_the_longest_and_as_many_as_the_solver_needs() -> None:
    def steps(name: str) -> list[int]:
        return [SOLVERS[name].steps(length / 1000) for length in (1, 20, 21, 60, 1000)]

    assert LONGEST_STEP == 0.02
    assert steps("euler") == steps("heun") == [1, 1, 2, 3, 50]
    assert steps("dpm") == steps("unipc") == [2, 2, 2, 3, 50]


INPUTS: dict[str, Any] = {"sigma": SIGMA, "noise": NOISE}
PENALTIES = {"l2": squared, "huber": huber(0.1, "snr"), "smooth_l1": smooth_l1(0.1, "constant")}


def backward(model: Model, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's loss, and the gradient of their sum."""
    losses.sum().backward()
    assert model.mix.weight.grad is not None
    return losses.detach(), model.mix.weight.grad


def loss_and_gradient(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    model = Model()
    return backward(model, rollout_loss(model, x, LATENTS, CONDITION, **INPUTS, **options))


@pytest.mark.parametrize("reflex", [Reflex(), Reflex(1.0, 10.0, 0.5)], ids=["plain", "reflexflow"])
@pytest.mark.parametrize("loss_type", PENALTIES)
def test_without_rollouts_it_is_the_plain_loss_bit_for_bit(loss_type: str, reflex: Reflex) -> None:
    penalty = PENALTIES[loss_type]
    model = Model()
    plain, gradient = backward(model, flow_loss(model, LATENTS, CONDITION, **INPUTS, penalty=penalty))
    none = torch.zeros(B, dtype=torch.bool)
    x = noised(LATENTS, NOISE, SIGMA)
    found = loss_and_gradient(x, is_rolled=none, unrolled=torch.zeros_like(x), reflex=reflex, penalty=penalty)
    assert torch.equal(found[0], plain)
    assert torch.equal(found[1], gradient)


def test_a_sample_that_is_not_rolled_keeps_its_loss_beside_one_that_is() -> None:
    plain = flow_loss(Model(), LATENTS, CONDITION, **INPUTS)
    found, _ = loss_and_gradient(
        walked(Model()), is_rolled=SOURCE > SIGMA, unrolled=NOISE, reflex=Reflex(1.0, 10.0, 0.5)
    )
    assert torch.equal(found[1], plain[1])
    assert not torch.isclose(found, plain)[[0, 2, 3]].any()


def test_neutral_reflexflow_is_the_plain_rollout_loss_bit_for_bit() -> None:
    x = walked(Model())
    found = loss_and_gradient(x, is_rolled=SOURCE > SIGMA, unrolled=NOISE, reflex=Reflex(0.0, 0.0, 1.0))
    model = Model()
    error = model(x, SIGMA, CONDITION).float() - velocity(LATENTS, NOISE)
    losses, gradient = backward(model, reduce(error.square(), "b c h w -> b", "mean"))
    assert torch.equal(found[0], losses)
    assert torch.equal(found[1], gradient)


def test_the_terms_of_reflexflow_are_those_of_its_formula() -> None:
    """In float64, element by element, against the sum of its parts."""
    x, clean = walked(Model()), normal(9)
    reflex = Reflex(alpha=0.7, beta1=3.0, beta2=0.25)
    found, _ = loss_and_gradient(x, is_rolled=torch.ones(B, dtype=torch.bool), unrolled=clean, reflex=reflex)
    for index in range(B):
        v_b = Model()(x, SIGMA, CONDITION).detach()[index].double().flatten()
        e = (clean[index].double().flatten() - v_b).abs()
        weight = 1 + 0.7 * e / e.mean()
        error = v_b - (NOISE - LATENTS)[index].double().flatten()
        away = (x - LATENTS)[index].double().flatten()
        cosine = (v_b @ away) / (v_b.norm() * away.norm())
        expected = 0.25 * (weight * error**2).mean() + 3.0 * 2 * (1 - cosine)
        assert found[index].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_weight_holds_for_whatever_the_loss_is() -> None:
    found, _ = loss_and_gradient(
        walked(Model()), is_rolled=torch.ones(B, dtype=torch.bool), unrolled=normal(9),
        reflex=Reflex(alpha=1.0), penalty=huber(0.1, "snr"),
    )  # fmt: skip
    v_b = Model()(walked(Model()), SIGMA, CONDITION).detach()
    penalties = huber(0.1, "snr")(v_b - (NOISE - LATENTS), SIGMA)
    expected = (compensation(normal(9), v_b, 1.0) * penalties).mean((1, 2, 3))
    torch.testing.assert_close(found, expected)


def test_the_weight_has_a_real_effect_and_knows_no_sign() -> None:
    clean, rolled = normal(3, 2, 128, 16, 16), normal(4, 2, 128, 16, 16)
    weights = compensation(clean, rolled, 1.0)
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.full((2,), 2.0))
    assert weights.min() >= 1
    assert weights.std() > 0.5
    # By a sum over the 32,768 elements the weight would be 1.
    e = clean - rolled
    assert (e / e.abs().sum((1, 2, 3), keepdim=True)).abs().max() < 2e-4
    # A latent channel's sign is the autoencoder's whim.
    flip = torch.where(torch.arange(128) % 3 > 0, 1.0, -1.0).reshape(1, -1, 1, 1)
    assert torch.equal(compensation(clean * flip, rolled * flip, 1.0), weights)
    assert torch.equal(compensation(clean, clean, 1.0), torch.ones_like(clean))


def test_the_weight_does_not_pull_a_right_prediction_away() -> None:
    """Gaussian data, exact velocity: the mean pull of the weighted loss on the prediction, in residual deviations.

    Weighted by |e| it vanishes (to the noise of 2 million draws), by e itself it does not, which is the reason for
    |e|: docs/decisions/0006-reflexflow-weight.md.
    """
    n, sigma, length = 2_000_000, 0.5, 0.02
    data, noise = normal(1, n).double() * 0.5 + 0.3, normal(2, n).double()

    def field(x: Tensor, s: float) -> Tensor:
        return (s - (1 - s) / 4) / ((1 - s) ** 2 / 4 + s * s) * (x - (1 - s) * 0.3) - 0.3

    source = sigma + length
    x = (1 - source) * data + source * noise
    for step in range(4):
        x = x - length / 4 * field(x, source - step * length / 4)
    plain = (1 - sigma) * data + sigma * noise
    residual = field(x, sigma) - (noise - data)
    residual = residual - residual.mean()
    e = field(plain, sigma) - field(x, sigma)

    def pull(weight: Tensor) -> float:
        return (weight * residual).mean().item() / residual.std().item()

    assert abs(pull(1 + e.abs() / e.abs().mean())) < 0.005
    assert abs(pull((1 + e / e.abs().mean()).clamp(min=0))) > 0.3


def test_compensation_needs_the_clean_prediction() -> None:
    with pytest.raises(ValueError, match="plainly noised"):
        loss_and_gradient(walked(Model()), is_rolled=torch.ones(B, dtype=torch.bool), reflex=Reflex(alpha=1.0))


def test_the_prediction_has_no_gradient_where_the_mask_is_zero() -> None:
    """Neither from the error, nor from ReflexFlow's terms."""
    weight = torch.rand(B, 3, 5, generator=torch.Generator().manual_seed(7))
    weight[:, 1], weight[2, :, 2:] = 0, 0
    prediction = normal(8).requires_grad_()
    found = rollout_loss(
        lambda x, sigma, condition: prediction, walked(Model()), LATENTS, CONDITION, **INPUTS,
        is_rolled=SOURCE > SIGMA, unrolled=normal(9), reflex=Reflex(1.0, 10.0, 0.5), weight=weight,
    )  # fmt: skip
    found.sum().backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad.ne(0).any(1), weight > 0)


def test_drift_is_an_angle() -> None:
    one = normal(1)
    torch.testing.assert_close(drift(one, 3 * one), torch.zeros(B), atol=1e-5, rtol=0)
    torch.testing.assert_close(drift(one, -one), torch.full((B,), 4.0))
    assert drift(torch.zeros_like(one), one).isfinite().all()


def test_on_the_path_the_right_prediction_does_not_drift() -> None:
    away = noised(LATENTS, NOISE, SIGMA) - LATENTS
    torch.testing.assert_close(drift(NOISE - LATENTS, away), torch.zeros(B), atol=1e-5, rtol=0)
    assert math.isclose(drift(LATENTS - NOISE, away)[0].item(), 4.0, rel_tol=1e-5)
