"""Losses against the base model's own predictions, on a small FLUX.2 transformer."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiers import others_slow
from tests.unit.flux2.test_arithmetic import FUSED
from tests.unit.flux2.test_shards import SPEC, a_batch, adapted, base
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simpletuner.config.run import RunConfig
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.flow.choice import TokenChoice
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flow.path import noised, velocity
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.lora import Adapter
from simpletuner.flux2.routes import Route
from simpletuner.memory import recompute
from simpletuner.memory.trace import Ledger
from simpletuner.train import optim
from simpletuner.train.preservation import Preservation
from simpletuner.train.rollout import Rollout
from simpletuner.train.step import Objective, Stepper
from simpletuner.train.throughput import FlopMeter

ROUTES = (Route(1, 2, 0.5),)


def config(**options: Any) -> RunConfig:
    chosen = {"preservation": "blank", "mixed_precision": "no", "max_grad_norm": 0.0} | options
    return RunConfig.model_validate(chosen)


def made(options: RunConfig, *, is_zero: bool = False, **lora: Any) -> tuple[Stepper, Adapter, Denoiser]:
    """A stepper of a transformer whose adapter acts, or with `is_zero` does not."""
    transformer = base()
    adapter = adapted(transformer, **lora)
    if is_zero:
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if name.endswith(".b"):
                    parameter.zero_()
    denoiser = Denoiser(transformer)
    return (
        Stepper(
            denoise=denoiser,
            parameters=adapter.parameters(),
            optimizer=optim.build(adapter.parameters(), options),
            options=options,
            objective=Objective.of(options, options, seed=0),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            device=torch.device("cpu"),
            route=denoiser.routed,
            rollout=Rollout.of(options, 0),
            preservation=Preservation.of(options, denoiser, adapter),
        ),
        adapter,
        denoiser,
    )


def preserving(batch: Batch, weights: tuple[float, ...] = (1.0, 0.0)) -> Batch:
    """`batch` with contexts of other prompts to preserve."""
    context = torch.randn(2, 8, SPEC.context_dim, generator=torch.Generator().manual_seed(9))
    return replace(batch, preserved=TextContext.dense(context), preserved_weights=torch.tensor(weights))


def whole(*batches: Batch) -> GlobalBatch:
    names = tuple(name for batch in batches for name in batch.names)
    return GlobalBatch(1, 0, batches, len(names), names)


def gradients(adapter: Adapter) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 10
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("options", [{}, {"scheduled_sampling_max_step_offset": 40}], ids=["plain", "rollout"])
def test_an_adapter_of_zeros_is_the_base_and_changes_no_bit(options: dict[str, Any]) -> None:
    """With dropout: neither the base's passes nor the second loss change what is drawn after them."""
    found = []
    for batches in ([a_batch(range(2)), a_batch(range(2, 4))], None):
        stepper, adapter, _ = made(config(**options), is_zero=True, lora_dropout=0.3)
        own = [a_batch(slots, stepper.rollout, routes=ROUTES) for slots in (range(2), range(2, 4))]
        group = whole(*own) if batches else whole(*map(preserving, own))
        losses = stepper.backward(group)
        found.append((losses, gradients(adapter), torch.get_rng_state()))
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


def by_hand(denoiser: Denoiser, adapter: Adapter, batch: Batch, condition: Condition) -> Tensor:
    """mean (v − v_base)² of each sample."""
    x = noised(batch.latents, batch.noise, batch.sigma)
    with adapter.disabled(), torch.no_grad():
        target = denoiser(x, batch.sigma, condition, batch.choices)
    return (denoiser(x, batch.sigma, condition, batch.choices) - target).square().mean((1, 2, 3))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_backward_passes_have_the_gradients_of_one(checkpointing: bool) -> None:
    """To 1e-6 of the largest: sums of fp32 are taken in another order."""
    options = config()
    batch = preserving(a_batch(range(2), routes=ROUTES), (2.0, 0.5))
    stepper, adapter, denoiser = made(options)
    if checkpointing:
        recompute.install(denoiser.transformer.blocks, None)
    result_losses = stepper.backward(whole(batch))
    apart = gradients(adapter)
    for parameter in adapter.parameters():
        parameter.grad = None
    assert batch.preserved is not None
    condition = Condition(batch.preserved, batch.condition.guidance)
    losses = stepper.losses(batch)
    held = by_hand(denoiser, adapter, batch, condition) * batch.preserved_weights
    ((losses.sum() + held.sum()) / 2).backward()
    assert result_losses == losses.tolist()
    for one, other in zip(apart, gradients(adapter), strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()
    assert held.min() > 0
    result = stepper(whole(batch), 0.0)
    assert result.preservation_loss == pytest.approx(held.mean().item(), rel=1e-6)
    assert result.loss == pytest.approx(losses.mean().item(), rel=1e-6)


def test_a_sample_that_takes_no_part_has_no_gradient_of_it() -> None:
    found = []
    for weights, noise in (((1.0, 0.0), 0.0), ((1.0, 0.0), 1.0)):
        stepper, adapter, _ = made(config())
        batch = a_batch(range(2))
        batch = preserving(replace(batch, weights=torch.zeros(2)), weights)
        batch.latents[1] += noise
        stepper.backward(whole(batch))
        found.append(gradients(adapter))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_without_one_there_is_no_second_loss() -> None:
    stepper, _, _ = made(config(preservation="none"))
    assert stepper(whole(a_batch(range(2))), 0.0).preservation_loss is None
    held, _, _ = made(config())
    assert held(whole(a_batch(range(2))), 0.0).preservation_loss == 0


def test_a_regularization_sets_target_is_the_base() -> None:
    stepper, adapter, denoiser = made(config(preservation="none"))
    batch = replace(a_batch(range(2), routes=ROUTES), is_regularization=True, weights=torch.tensor([1.0, 3.0]))
    masked = replace(batch, masks=torch.zeros(2, 4, 4))
    expected = by_hand(denoiser, adapter, batch, batch.condition) * batch.weights
    losses = stepper.losses(batch)
    torch.testing.assert_close(losses, expected)
    assert torch.equal(stepper.losses(masked), losses), "masks do not weigh it"
    zero, _, _ = made(config(preservation="none"), is_zero=True)
    assert zero.losses(batch).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_the_prior_is_the_mean_distance_to_the_base_outside_of_the_mask(floor: float) -> None:
    m = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(5))
    m[0, :2] = 1
    batch = replace(a_batch(range(2)), masks=floor + (1 - floor) * m, outside_masks=1 - m)
    stepper, adapter, denoiser = made(config(masked_loss_prior=0.7))
    x = noised(batch.latents, batch.noise, batch.sigma)
    with torch.no_grad():
        prediction = denoiser(x, batch.sigma, batch.condition)
        with adapter.disabled():
            target = denoiser(x, batch.sigma, batch.condition)
    error = (prediction - velocity(batch.latents, batch.noise)).square().mean(1)
    away = ((1 - m) * (prediction - target).square().mean(1)).mean((1, 2))
    assert batch.masks is not None
    expected = (batch.masks * error).sum((1, 2)) / batch.masks.sum((1, 2)) + 0.7 * away
    torch.testing.assert_close(stepper.losses(batch), expected)


@pytest.mark.parametrize("options", [{}, {"scheduled_sampling_max_step_offset": 40}], ids=["plain", "rollout"])
def test_with_masks_of_ones_the_prior_changes_no_bit(options: dict[str, Any]) -> None:
    found = []
    for prior, masks in ((0.0, None), (0.5, None), (0.5, torch.ones(2, 4, 4))):
        stepper, adapter, _ = made(config(masked_loss_prior=prior, **options), lora_dropout=0.2)
        outside = None if masks is None else 1 - masks
        batch = replace(a_batch(range(2), stepper.rollout), masks=masks, outside_masks=outside)
        found.append((stepper.backward(whole(batch)), gradients(adapter)))
    assert found[0][0] == found[1][0] == found[2][0]
    assert_equal(found[0][1], found[1][1])
    assert_equal(found[0][1], found[2][1])


def test_all_of_them_take_the_input_that_is_trained() -> None:
    """With a rollout that is what the model has made."""
    stepper, _, denoiser = made(config(scheduled_sampling_max_step_offset=400, masked_loss_prior=1.0))
    assert stepper.rollout is not None
    step = next(step for step in range(1, 9) if all(stepper.rollout.lengths(step, range(2))))
    batch = preserving(a_batch(range(2), stepper.rollout, step), (1.0, 1.0))
    batch = replace(batch, masks=torch.rand(2, 4, 4), outside_masks=torch.rand(2, 4, 4))
    seen: list[tuple[bool, Tensor]] = []

    def watched(latents: Tensor, sigma: Tensor, condition: Condition, choices: Any = ()) -> Tensor:
        if torch.equal(sigma, batch.sigma):
            seen.append((torch.is_grad_enabled(), latents))
        return denoiser(latents, sigma, condition, choices)

    assert stepper.preservation is not None
    held = replace(stepper.preservation, denoise=watched)
    replace(stepper, denoise=watched, route=None, preservation=held).backward(whole(batch))
    (_, unrolled), *trained = seen
    assert [is_learning for is_learning, _ in trained] == [False, True, False, True]
    assert all(torch.equal(x, trained[0][1]) for _, x in trained)
    assert not torch.equal(unrolled, trained[0][1])


def test_reflexflow_compares_with_a_prediction_that_is_routed_as_the_trained_one() -> None:
    stepper, _, denoiser = made(config(preservation="none", scheduled_sampling_max_step_offset=40))
    assert stepper.rollout is not None
    step = next(step for step in range(1, 9) if all(stepper.rollout.lengths(step, range(2))))
    batch = a_batch(range(2), stepper.rollout, step, routes=ROUTES)
    assert batch.choices
    x = noised(batch.latents, batch.noise, batch.sigma)
    with torch.no_grad():
        expected = denoiser(x, batch.sigma, batch.condition, batch.choices)
    unrolled = stepper._inputs(batch).unrolled
    assert unrolled is not None
    assert torch.equal(unrolled, expected)


@pytest.mark.parametrize("is_regularization", [False, True])
def test_a_failing_pass_leaves_the_adapter_on(is_regularization: bool) -> None:
    stepper, adapter, _ = made(config())

    def failing(*_: Any) -> Tensor:
        assert not any(layer.is_enabled for layer in adapter.layers.values())
        raise ZeroDivisionError

    assert stepper.preservation is not None
    failing_one = replace(stepper, preservation=replace(stepper.preservation, denoise=failing))
    batch = replace(preserving(a_batch(range(2))), is_regularization=is_regularization)
    with pytest.raises(ZeroDivisionError):
        failing_one.backward(whole(batch))
    assert all(layer.is_enabled for layer in adapter.layers.values())


def test_of_a_sharded_model_every_rank_makes_as_many_passes() -> None:
    taken: list[None] = []
    stepper, _, denoiser = made(config())
    calls: list[bool] = []

    def counted(latents: Tensor, sigma: Tensor, condition: Condition, choices: Any = ()) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return denoiser(latents, sigma, condition, choices)

    assert stepper.preservation is not None
    held = replace(stepper.preservation, denoise=counted, idle=lambda: taken.append(None))
    sharded = replace(stepper, denoise=counted, route=None, preservation=held)
    plain = replace(a_batch(range(2)), other_ranks_distill=True)
    for batch, idle in (
        (preserving(plain), 1),
        (plain, 1),
        (replace(plain, is_regularization=True), 0),
        (a_batch(range(2)), 0),
    ):
        calls.clear()
        taken.clear()
        sharded.backward(whole(batch))
        first = [False] if batch.is_regularization else []
        assert (calls, len(taken)) == ([*first, True, False, True], idle)


@pytest.mark.parametrize("kept", others_slow([16, 12, 4], 12))
@pytest.mark.parametrize("kind", ["second loss", "regularization", "prior"])
def test_passes_are_counted(kind: str, kept: int) -> None:
    """With a route that keeps 4 of 16 tokens, or as many as masks force."""
    route = {"selection_ratio": 0.25, "start_layer_idx": 1, "end_layer_idx": 2}
    options = config(masked_loss_prior=1.0 if kind == "prior" else 0.0, tread_config={"routes": [route]})
    stepper, _, denoiser = made(options)
    batch = replace(a_batch(range(2)), choices=(TokenChoice(1, 2, torch.arange(kept).expand(2, -1)),))
    if kind == "second loss":
        batch = preserving(batch)
    elif kind == "prior":
        batch = replace(batch, masks=torch.rand(2, 4, 4), outside_masks=torch.rand(2, 4, 4))
    else:
        batch = replace(batch, is_regularization=True)
    meter = FlopMeter(options, denoiser.transformer, None, None, preservation=stepper.preservation)
    recompute.install(denoiser.transformer.blocks, None)
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        stepper(whole(batch), 0.0)
    assert meter.flop(whole(batch)).hardware == counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", others_slow([False, True], True))
def test_the_peak_is_that_of_a_step_without(checkpointing: bool) -> None:
    """Bytes of all tensors of a step, traced: at most 3 % above the step without."""
    peaks = []
    for hold in (None, "second loss", "regularization"):
        stepper, _, denoiser = made(config())
        if checkpointing:
            recompute.install(denoiser.transformer.blocks, None)
        generator = torch.Generator().manual_seed(0)
        latents, noise = (torch.randn(2, 128, 24, 24, generator=generator) for _ in range(2))
        batch = replace(a_batch(range(2)), latents=latents, noise=noise)
        if hold is not None:
            batch = preserving(batch) if hold == "second loss" else replace(batch, is_regularization=True)
        known = [*denoiser.transformer.parameters(), latents, noise]
        with Ledger(known) as ledger:
            stepper.backward(whole(batch))
        peaks.append(ledger.peak)
    assert max(peaks[1:]) <= 1.03 * peaks[0]
