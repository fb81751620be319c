"""The step on a model small enough to check by hand: two learned numbers."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from simpletuner.base.errors import DataError
from simpletuner.config.options.guidance import GuidanceOptions
from simpletuner.config.options.optim import OptimOptions
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.flow.choice import TokenChoice
from simpletuner.flow.condition import Condition, Denoise, TextContext
from simpletuner.flow.sigma import mu_linear, shifted
from simpletuner.memory.masters import Masters
from simpletuner.train import optim
from simpletuner.train.step import NotFiniteError, Objective, Stepper

CPU = torch.device("cpu")


def objective(seed: int = 0, **options: object) -> Objective:
    guidance = {key: value for key, value in options.items() if key.startswith("flux_guidance")}
    schedule = {key: value for key, value in options.items() if not key.startswith("flux_guidance")}
    return Objective.of(ScheduleOptions(**schedule), GuidanceOptions(**guidance), seed)  # type: ignore[arg-type]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.offset = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return x * self.scale + self.offset * (sigma + condition.guidance).reshape(-1, 1, 1, 1)


def stepper(model: Model, **options: object) -> Stepper:
    chosen = OptimOptions(learning_rate=0.1, **options)  # type: ignore[arg-type]
    parameters = list(model.parameters())
    return Stepper(
        denoise=model,
        parameters=parameters,
        optimizer=optim.build(parameters, chosen),
        options=chosen,
        objective=objective(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=CPU,
    )


def whole(step: int, *batches: Sequence[str]) -> GlobalBatch:
    """A global batch of micro-batches that are given by the names of their samples, with the draws of `step`."""
    made: list[Batch] = []
    first = 0
    for names in batches:
        latents = torch.stack([torch.full((128, 2, 3), float(len(name))) for name in names])
        slots = range(first, first + len(names))
        draws = objective().draw(step, slots, (128, 2, 3))
        condition = Condition(TextContext.dense(torch.zeros(len(names), 4, 6)), draws.guidance)
        weights = torch.ones(len(names))
        made.append(Batch(latents, condition, draws.sigma, draws.noise, tuple(names), weights, slots))
        first = slots.stop
    return GlobalBatch(step, 0, tuple(made), first)


def test_a_draw_depends_on_seed_step_and_slot_and_on_nothing_else() -> None:
    one = objective().draw(7, range(4), (128, 2, 2))
    again = objective().draw(7, range(2, 4), (128, 2, 2))
    assert torch.equal(one.noise[2:], again.noise)
    assert torch.equal(one.sigma[2:], again.sigma)
    others = [objective().draw(8, range(4), (128, 2, 2)), objective(seed=1).draw(7, range(4), (128, 2, 2))]
    for other in others:
        assert not torch.equal(one.noise, other.noise)
        assert not torch.equal(one.sigma, other.sigma)
    assert not torch.equal(one.noise[0], one.noise[1])


def test_drawing_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    objective(flux_guidance_mode="random-range").draw(1, range(3), (128, 2, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_sigma_has_the_density_of_the_options() -> None:
    slots = range(1000)
    plain = objective(flow_schedule_shift=1.0).draw(1, slots, (1, 1, 1)).sigma
    assert plain.median().item() == pytest.approx(0.5, abs=0.03)
    assert plain.quantile(0.75).item() == pytest.approx(1 / (1 + math.exp(-0.6745)), abs=0.03)
    shift = objective().draw(1, slots, (1, 1, 1)).sigma
    assert torch.allclose(shift, torch.tensor([shifted(value, 3.0) for value in plain.tolist()]), atol=1e-6)
    uniform = objective(flow_schedule_shift=1.0, flow_use_uniform_schedule=True).draw(1, slots, (1, 1, 1)).sigma
    assert uniform.quantile(0.25).item() == pytest.approx(0.25, abs=0.03)
    beta = objective(
        flow_schedule_shift=1.0, flow_use_beta_schedule=True, flow_beta_schedule_alpha=5.0, flow_beta_schedule_beta=1.0
    )
    assert beta.draw(1, range(500), (1, 1, 1)).sigma.mean().item() == pytest.approx(5 / 6, abs=0.03)


def test_the_auto_shift_counts_the_latents_own_tokens() -> None:
    plain = objective(flow_schedule_shift=1.0).draw(1, range(5), (1, 64, 64)).sigma
    auto = objective(flow_schedule_auto_shift=True).draw(1, range(5), (1, 64, 64)).sigma
    expected = [shifted(value, math.exp(mu_linear(4096))) for value in plain.tolist()]
    assert auto.tolist() == pytest.approx(expected, abs=1e-6)


def test_guidance_is_constant_or_even_over_its_range() -> None:
    assert objective(flux_guidance_value=3.5).draw(1, range(3), (1, 1, 1)).guidance.tolist() == [3.5] * 3
    spread = objective(flux_guidance_mode="random-range", flux_guidance_min=1.0, flux_guidance_max=5.0)
    drawn = spread.draw(1, range(2000), (1, 1, 1)).guidance
    assert drawn.min().item() >= 1.0
    assert drawn.max().item() <= 5.0
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.1)


def test_accumulating_two_batches_of_one_is_one_batch_of_two() -> None:
    """To 1e-6: sums of fp32 are taken in another order."""
    together, apart = Model(), Model()
    one = stepper(together)(whole(1, ["a", "bbb"]), 0.1)
    two = stepper(apart)(whole(1, ["a"], ["bbb"]), 0.1)
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-6)
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_every_sample_of_a_group_weighs_the_same_whatever_its_batch() -> None:
    together, apart = Model(), Model()
    stepper(together).backward(whole(1, ["a", "b", "ccc"]))
    stepper(apart).backward(whole(1, ["a", "b"], ["ccc"]))
    assert together.scale.grad is not None
    assert apart.scale.grad is not None
    torch.testing.assert_close(together.scale.grad, apart.scale.grad, rtol=1e-6, atol=1e-6)


def test_the_step_uses_the_rate_it_is_given_and_leaves_no_gradient() -> None:
    model = Model()
    stepper(model, adam_weight_decay=0.0)(whole(1, ["a"]), 0.0)
    assert model.scale.item() == 0.5
    assert model.scale.grad is None
    stepper(model, adam_weight_decay=0.0)(whole(1, ["a"]), 0.01)
    assert abs(model.scale.item() - 0.5) == pytest.approx(0.01, rel=1e-3)  # Adam's first step is the rate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "fp32", "fp64"])
def test_losses_and_gradient_norm_are_read_together_without_rounding(dtype: torch.dtype) -> None:
    """Losses are fp32; the norm has the dtype of the gradients."""
    model, reference = Model().to(dtype), Model().to(dtype)
    group = whole(1, ["a"], ["bbb", "cc"])
    losses = stepper(reference).backward(group)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in reference.parameters()])
    assert norm.dtype == dtype
    found = stepper(model)(group, 0.1)
    assert found.loss == math.fsum(losses) / 3
    assert found.grad_norm == norm.item()


def test_weights_of_one_change_no_bit_and_others_multiply_the_loss() -> None:
    batch = whole(1, ["a", "bbb"])
    (micro,) = batch.batches
    losses, gradients = [], []
    for weights in (micro.weights, torch.tensor([2.0, 0.0])):
        model = Model()
        weighted = replace(batch, batches=(replace(micro, weights=weights),))
        losses.append(stepper(model).backward(weighted))
        gradients.append(model.scale.grad)
    alone, first = Model(), replace(whole(1, ["a"]), size=2)
    assert losses[1] == [2 * losses[0][0], 0.0]
    assert stepper(alone).backward(first) == losses[0][:1]
    assert alone.scale.grad is not None
    torch.testing.assert_close(gradients[1], 2 * alone.scale.grad)


def test_a_mask_of_ones_changes_no_bit() -> None:
    batch = whole(1, ["a", "bbb"])
    found = []
    for masks in (None, torch.ones(2, 2, 3)):
        model = Model()
        masked = replace(batch, batches=tuple(replace(micro, masks=masks) for micro in batch.batches))
        found.append((stepper(model).backward(masked), model.scale.grad))
    assert found[0] == found[1]


def test_a_route_takes_the_place_of_the_denoiser_for_each_batch() -> None:
    model, asked = Model(), []

    def route(choices: Sequence[TokenChoice]) -> Denoise:
        asked.append(choices)
        return lambda *inputs: model(*inputs) + 1

    plain = stepper(model)
    routed = replace(plain, route=route)
    group = whole(7, ["a", "b"], ["ccc"])
    one, other = group.batches
    one = replace(one, choices=(TokenChoice(0, 1, torch.tensor([[0, 3], [2, 4]])),))
    group = replace(group, batches=(one, other))
    assert routed.backward(group) != plain.backward(group)
    assert [len(choices) for choices in asked] == [1, 0]
    assert torch.equal(asked[0][0].kept_tokens, one.choices[0].kept_tokens)


def test_a_loss_that_is_not_finite_stops_with_the_names_of_its_samples_before_anything_is_updated() -> None:
    model = Model()
    good, bad = whole(4, ["fine"], ["set/broken.png"]).batches
    bad = replace(bad, latents=torch.full((1, 128, 2, 3), math.inf))
    with pytest.raises(DataError, match=r"loss of step 4 .*set/broken\.png") as caught:
        stepper(model)(GlobalBatch(4, 0, (good, bad), 2), 0.1)
    assert "fine" not in str(caught.value)
    assert model.scale.item() == 0.5


@pytest.mark.parametrize("has_masters", [False, True], ids=["fp32", "masters"])
@pytest.mark.parametrize("has_fp16", [False, True], ids=["unscaled", "scaled"])
def test_a_step_that_is_not_finite_and_discarded_leaves_no_trace(has_fp16: bool, has_masters: bool) -> None:
    found = []
    for is_spoiled in (False, True):
        model = Model()
        scaler = torch.amp.GradScaler("cpu", enabled=has_fp16, init_scale=2.0**10)
        trained = mastered(model, scaler) if has_masters else replace(stepper(model), scaler=scaler)
        trained(whole(1, ["a"], ["bbb"]), 0.1)
        if is_spoiled:
            good, bad = whole(2, ["fine"], ["broken"]).batches
            bad = replace(bad, latents=torch.full((1, 128, 2, 3), math.inf))
            with pytest.raises(NotFiniteError):
                trained(GlobalBatch(2, 0, (good, bad), 2), 0.1)
            trained.discard()
        result = trained(whole(3, ["cc"], ["d"]), 0.1)
        state = [value for held in trained.optimizer.state.values() for value in held.values()]
        found.append((result, [*(parameter.detach() for parameter in model.parameters()), *state]))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    model = Model()

    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(_ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient * math.nan

    trained = stepper(model)
    exploding = Stepper(**(vars(trained) | {"denoise": lambda *inputs: Exploding.apply(model(*inputs))}))
    with pytest.raises(DataError, match="gradient of step 4 is not finite"):
        exploding(whole(4, ["a", "b"]), 0.1)
    assert model.scale.item() == 0.5


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows() -> None:
    model = Model()
    trained = stepper(model)
    scaled = Stepper(**(vars(trained) | {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10)}))
    assert math.isfinite(scaled(whole(1, ["a"]), 0.1).grad_norm)
    before = model.scale.item()
    assert before != 0.5
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    overflowing = Stepper(**(vars(trained) | {"scaler": scaler}))
    assert not math.isfinite(overflowing(whole(2, ["aaaa"]), 0.1).grad_norm)
    assert model.scale.item() == before
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("is_autocast", [False, True])
def test_autocast_is_apart_from_the_scaled_loss(is_autocast: bool) -> None:
    """Over fp16 weights nothing is cast."""
    model, seen = Model(), []

    def denoise(*inputs: object) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return model(*inputs)

    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    Stepper(**(vars(stepper(model)) | {"scaler": scaler, "denoise": denoise, "is_autocast": is_autocast}))(
        whole(1, ["a"]), 0.1
    )
    assert seen == [is_autocast]


def mastered(model: Model, scaler: torch.amp.GradScaler, **options: object) -> Stepper:
    """The step of a model that computes in bf16."""
    masters = Masters(dict(model.named_parameters()), torch.bfloat16)
    chosen = OptimOptions(learning_rate=0.1, adam_weight_decay=0.0, **options)  # type: ignore[arg-type]
    parameters = list(masters.parameters.values())
    plain = vars(stepper(model)) | {"parameters": parameters, "optimizer": optim.build(parameters, chosen)}
    return Stepper(**(plain | {"masters": masters, "scaler": scaler}))


@pytest.mark.parametrize("has_fp16", [False, True], ids=["bf16", "fp16"])
def test_masters_step_and_the_weights_follow(has_fp16: bool) -> None:
    model = Model()
    trained = mastered(model, torch.amp.GradScaler("cpu", enabled=has_fp16, init_scale=2.0**10))
    group = whole(1, ["a"], ["bbb"])
    for _ in range(20):
        assert math.isfinite(trained(group, 1e-5).grad_norm)
    assert trained.masters is not None
    master = trained.masters.parameters["scale"]
    assert model.scale.item() == 0.5  # a hundred steps away in bf16
    assert abs(master.item() - 0.5) == pytest.approx(20e-5, rel=0.01)
    assert master.grad is None
    assert model.scale.grad is None
    trained(group, 0.1)
    assert model.scale.item() == master.bfloat16().item() != 0.5


def test_a_step_that_is_not_taken_leaves_masters_and_weights() -> None:
    model = Model()
    trained = mastered(model, torch.amp.GradScaler("cpu", init_scale=2.0**127))
    assert not math.isfinite(trained(whole(1, ["aaaa"]), 0.1).grad_norm)
    assert model.scale.item() == 0.5
    assert trained.masters is not None
    assert trained.masters.parameters["scale"].item() == 0.5
