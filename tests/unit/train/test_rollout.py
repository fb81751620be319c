"""Which samples are rolled out and how far, and the step with it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner.config.options.guidance import GuidanceOptions
from simpletuner.config.options.optim import OptimOptions
from simpletuner.config.options.rollout import RolloutOptions
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.train import optim
from simpletuner.train.rollout import Rollout, starts_of
from simpletuner.train.step import Objective, Stepper

SHAPE = (128, 2, 3)


def rollout(seed: int = 0, **options: Any) -> Rollout:
    chosen = {"max_step_offset": 10} | options
    made = Rollout.of(RolloutOptions(**{f"scheduled_sampling_{key}": value for key, value in chosen.items()}), seed)
    assert made is not None
    return made


def test_an_offset_of_0_is_none() -> None:
    assert Rollout.of(RolloutOptions(), 0) is None
    assert Rollout.of(RolloutOptions(scheduled_sampling_probability=1.0), 0) is None


def test_a_length_depends_on_seed_step_and_slot_and_on_nothing_else() -> None:
    assert rollout().lengths(3, range(2, 6)) == rollout().lengths(3, range(6))[2:]
    many = [rollout(seed).lengths(step, range(40)) for seed, step in ((0, 1), (0, 2), (1, 1))]
    assert many[0] != many[1] != many[2] != many[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rollout().lengths(1, range(4))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("strategy", "mean", "below_5"),
    [("uniform", 5.0, 0.45), ("biased_early", 3.2, 0.67), ("biased_late", 6.8, 0.26)],
)
def test_lengths_are_drawn_by_the_strategy(strategy: str, mean: float, below_5: float) -> None:
    lengths = rollout(strategy=strategy).lengths(2, range(4000))
    assert (min(lengths), max(lengths)) == (0, 10)
    assert sum(lengths) / len(lengths) == pytest.approx(mean, abs=0.15)
    assert sum(length < 5 for length in lengths) / len(lengths) == pytest.approx(below_5, abs=0.03)


def test_the_probability_is_the_share_that_draws() -> None:
    assert not any(rollout(probability=0.0).lengths(1, range(200)))
    found = rollout(probability=0.3, max_step_offset=999).lengths(1, range(4000))
    assert sum(length > 0 for length in found) / len(found) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(("shape", "first_third"), [("linear", 1 / 3), ("cosine", 1 / 4)])
def test_the_ramp_goes_from_start_to_end(shape: str, first_third: float) -> None:
    ramp = rollout(ramp_steps=30, start_step=100, prob_start=0.1, prob_end=0.85, ramp_shape=shape)
    found = [ramp.probability(step) for step in (1, 100, 110, 120, 130, 1000)]
    done = [0, 0, first_third, 1 - first_third, 1, 1]
    assert found == pytest.approx([0.1 + 0.75 * share for share in done])


def test_the_ramp_decides_and_not_the_probability() -> None:
    assert rollout(ramp_steps=5, prob_end=0.0).lengths(1000, range(50)) == (0,) * 50
    assert rollout(probability=0.25, prob_start=0.9).probability(1) == 0.25


@pytest.mark.parametrize(
    ("options", "steps", "calls"),
    [
        ({}, 1, 2),
        ({"reflexflow": False}, 1, 1),
        ({"reflexflow_alpha": 0.0}, 1, 1),
        ({"max_step_offset": 50}, 3, 4),
        ({"sampler": "heun", "max_step_offset": 50}, 3, 7),
        ({"sampler": "dpm"}, 2, 3),
        ({"sampler": "unipc", "max_step_offset": 100}, 5, 6),
    ],
)
def test_the_calls_are_those_of_the_plan(options: dict[str, Any], steps: int, calls: int) -> None:
    made = rollout(**options)
    assert (made.steps, made.calls) == (steps, calls)
    assert f"{steps} steps of {made.options.scheduled_sampling_sampler}" in made.describe().replace(
        "1 step ", "1 steps "
    )
    model = Model()
    trained = stepper(model, made)
    lengths = made.lengths(7, range(4))
    assert any(lengths)
    result = trained(whole(7, 4, made), 0.0)
    assert result.rollout_calls == calls
    assert model.calls == [False] * calls + [True]


class Model(torch.nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(128, 128)
        torch.nn.init.normal_(self.mix.weight, std=0.2, generator=torch.Generator().manual_seed(0))
        torch.nn.init.zeros_(self.mix.bias)
        self.dropout = torch.nn.Dropout(dropout)
        self.calls: list[bool] = []

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        context, guidance = condition.context.expanded(), condition.guidance
        self.calls.append(torch.is_grad_enabled())
        known = x + (sigma + guidance + context.mean((1, 2))).reshape(-1, 1, 1, 1)
        return torch.tanh(self.mix(self.dropout(known).movedim(1, -1))).movedim(-1, 1)


OBJECTIVE = Objective.of(ScheduleOptions(), GuidanceOptions(), 0)


def whole(step: int, count: int, made: Rollout | None, *, seed: int = 0, parts: int = 1) -> GlobalBatch:
    """A global batch of `count` samples in `parts` equal micro-batches, with the draws of `step`."""
    latents = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    size = count // parts
    batches = []
    for first in range(0, count, size):
        slots = range(first, first + size)
        draws = OBJECTIVE.draw(step, slots, SHAPE)
        batches.append(
            Batch(
                latents=latents[first : first + size],
                condition=Condition(TextContext.dense(torch.zeros(size, 4, 6)), draws.guidance),
                sigma=draws.sigma,
                noise=draws.noise,
                names=tuple(map(str, slots)),
                weights=torch.ones(size),
                slots=slots,
                rollout=None if made is None else made.starts(step, slots, draws.sigma),
            )
        )
    return GlobalBatch(step, 0, tuple(batches), count)


def stepper(model: Model, made: Rollout | None) -> Stepper:
    chosen = OptimOptions(learning_rate=0.1)
    parameters = list(model.parameters())
    return Stepper(
        denoise=model,
        parameters=parameters,
        optimizer=optim.build(parameters, chosen),
        options=chosen,
        objective=OBJECTIVE,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
        rollout=made,
    )


def trained(made: Rollout | None, *steps: int, dropout: float = 0.0) -> tuple[list[list[float]], list[Tensor]]:
    """The loss of each sample in each step, and what has been learned at the end."""
    model = Model(dropout)
    step = stepper(model, made)
    losses = []
    for number in steps:
        batch = whole(number, 3, made, seed=number)
        losses.append(step.backward(batch))
        step.optimizer.zero_grad()
        step(batch, 0.1)
    return losses, [parameter.detach() for parameter in model.parameters()]


STEPS = range(1, 5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_probability_of_0_changes_no_bit(dropout: float) -> None:
    off_losses, off = trained(None, *STEPS, dropout=dropout)
    losses, found = trained(rollout(probability=0.0), *STEPS, dropout=dropout)
    assert losses == off_losses
    assert all(torch.equal(one, other) for one, other in zip(off, found, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_sample_that_draws_0_keeps_its_loss_bit_for_bit(dropout: float) -> None:
    """Dropout included: rolling out others does not move torch's generator."""
    made = rollout(probability=0.5)
    step = next(step for step in range(1, 50) if made.lengths(step, range(3)).count(0) == 1)
    lengths = made.lengths(step, range(3))
    (plain,), _ = trained(None, step, dropout=dropout)
    (found,), _ = trained(made, step, dropout=dropout)
    for length, one, other in zip(lengths, plain, found, strict=True):
        assert (one == other) == (length == 0)


def test_neutral_reflexflow_is_none_bit_for_bit() -> None:
    off = trained(rollout(reflexflow=False), *STEPS)
    neutral = {"reflexflow_alpha": 0.0, "reflexflow_beta1": 0.0, "reflexflow_beta2": 1.0}
    found = trained(rollout(**neutral), *STEPS)
    assert found[0] == off[0]
    assert all(torch.equal(one, other) for one, other in zip(off[1], found[1], strict=True))
    assert trained(rollout(), *STEPS)[0] != off[0]


def test_two_batches_draw_what_one_would() -> None:
    """To 1e-6: sums of fp32 are taken in another order."""
    made = rollout(probability=0.7)
    losses, gradients = [], []
    for parts in (1, 2):
        model = Model()
        losses.append(stepper(model, made).backward(whole(2, 4, made, parts=parts)))
        gradients.append(model.mix.weight.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-6 * gradients[0].abs().max()


def test_a_routed_model_learns_and_the_whole_one_walks() -> None:
    walking, learning = Model(), Model()
    (batch,) = whole(1, 2, None).batches
    sigma = torch.tensor([0.3, 0.5])
    batch = replace(batch, sigma=sigma, rollout=starts_of((4, 0), sigma))
    made = rollout(sampler="heun")
    inputs = made.inputs(learning, batch, sample=walking)
    made.losses(learning, batch, inputs, penalty=OBJECTIVE.penalty)
    assert walking.calls == [False, False]
    assert learning.calls == [False, True]


def test_under_autocast_every_gradient_arrives() -> None:
    """A weight cast in a pass without gradient must not be taken, from autocast's cache, by the pass that learns."""
    gradients = []
    for made in (rollout(reflexflow=False), None):
        model = Model()
        scaled = replace(stepper(model, made), scaler=torch.amp.GradScaler("cpu", init_scale=1.0), is_autocast=True)
        scaled.backward(whole(1, 3, made, seed=1))
        assert model.mix.weight.grad is not None
        gradients.append(model.mix.weight.grad.norm().item())
    assert gradients[0] == pytest.approx(gradients[1], rel=0.2)


def test_of_a_sharded_model_every_rank_makes_as_many_calls() -> None:
    taken: list[None] = []
    made = replace(rollout(), idle=lambda: taken.append(None))
    model = Model()
    (batch,) = whole(7, 4, made).batches
    without = replace(batch, rollout=None)
    at_one = replace(batch, sigma=torch.ones(4), rollout=starts_of((10, 0, 0, 10), torch.ones(4)))
    for given, calls, idle in (
        (batch, made.calls, 0),
        (replace(without, other_ranks_roll_out=True), 0, made.calls),
        (without, 0, 0),
        (at_one, 1, made.calls - 1),  # nothing is noisier than sigma 1: only ReflexFlow's call is left
    ):
        model.calls.clear()
        taken.clear()
        stepper(model, made).losses(given)
        assert (model.calls, len(taken)) == ([False] * calls + [True], idle)
