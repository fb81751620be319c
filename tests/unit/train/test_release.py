"""Parameters that are stepped inside the backward pass, against the ordinary step."""

from dataclasses import replace

import pytest
import torch
from tests.host_reads import MetaStepper, describe, host_reads
from tests.unit.train.test_host_reads import CPU, META, SPEC, global_batch, stepper
from torch import Tensor, nn

from simpletuner.base.draws import draw_seed
from simpletuner.config.options.optim import OptimOptions
from simpletuner.data.batch import GlobalBatch
from simpletuner.flux2.footprint import STEP_BYTES
from simpletuner.flux2.full import unfreeze
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.trace import Ledger
from simpletuner.train import optim, optimizer_state
from simpletuner.train.adafactor_bf16 import AdafactorBf16
from simpletuner.train.adamw_bf16 import CPU_CHUNK, ELEMENT_BYTES, GPU_CHUNK, noise_bits, stochastically_rounded
from simpletuner.train.release import GradientRelease, StepsOneParameter
from simpletuner.train.step import NotFiniteError, PartialStepError, Stepper

ONE_SLOW = pytest.mark.parametrize("name", ["adafactor", pytest.param("adamw_bf16", marks=pytest.mark.slow)])
OPTIMIZERS = pytest.mark.parametrize("name", ["adafactor", "adamw_bf16"])


def made(name: str, device: torch.device = CPU, *, releases: bool = True, kind: type[Stepper] = Stepper) -> Stepper:
    """A step of a small bf16 model with recomputed and routed blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = Flux2Transformer(SPEC).to(device, torch.bfloat16)
    options = {"optimizer": name, "grad_clip_method": "value", "optimizer_release_gradients": True}
    step = stepper(kind, (transformer, unfreeze(transformer)), device, **options)
    assert isinstance(step.optimizer, StepsOneParameter)
    release = GradientRelease(step.parameters, step.optimizer, step.options) if releases else None
    return replace(step, release=release, rollout=None)


def one_pass(step: int) -> GlobalBatch:
    (batch, _) = global_batch(step).batches
    return GlobalBatch(step, 0, (replace(batch, rollout=None),), 2)


def values(step: Stepper) -> list[Tensor]:
    names = {str(index): parameter for index, parameter in enumerate(step.parameters)}
    tensors, _ = optimizer_state.pack(step.optimizer, names)
    return [parameter.detach().clone() for parameter in step.parameters] + [
        tensors[name].clone() for name in sorted(tensors)
    ]


def are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@ONE_SLOW
def test_stepping_inside_the_backward_pass_has_the_bits_of_an_ordinary_step(name: str) -> None:
    released, ordinary = made(name), made(name, releases=False)
    before = values(released)
    for number in (1, 2):
        assert released(one_pass(number), 0.01) == ordinary(one_pass(number), 0.01)
        assert all(parameter.grad is None for parameter in released.parameters)
    assert are_equal(values(released), values(ordinary))
    assert not any(torch.equal(*pair) for pair in zip(before, values(released), strict=False))


@ONE_SLOW
def test_a_step_that_releases_waits_for_its_two_reads_alone(name: str) -> None:
    on_host, on_device, batch = made(name), made(name, META, kind=MetaStepper), one_pass(1)
    with host_reads(CPU) as found:
        on_host(batch, 0.01)
    assert len(found) == 2, describe(found)
    with host_reads(META) as found:
        on_device(batch, 0.01)
    assert not found, describe(found)


@OPTIMIZERS
def test_a_trial_pass_frees_gradients_and_steps_nothing(name: str) -> None:
    step = made(name)
    before = values(step)
    step.backward(one_pass(1))
    assert are_equal(values(step), before)
    assert all(parameter.grad is None for parameter in step.parameters)


def spoiled(number: int) -> GlobalBatch:
    whole = one_pass(number)
    return replace(whole, batches=(replace(whole.batches[0], latents=torch.full((2, 128, 4, 6), torch.inf)),))


@ONE_SLOW
def test_a_loss_that_is_not_finite_steps_nothing(name: str) -> None:
    step = made(name)
    step(one_pass(1), 0.01)
    before = values(step)
    with pytest.raises(NotFiniteError, match="the loss of step 2") as error:
        step(spoiled(2), 0.01)
    assert not isinstance(error.value, PartialStepError)
    assert are_equal(values(step), before)


@ONE_SLOW
def test_from_a_gradient_that_is_not_finite_on_no_parameter_is_stepped(name: str) -> None:
    step = made(name)
    step(one_pass(1), 0.01)
    order: list[int] = []
    handles = [
        each.register_post_accumulate_grad_hook(lambda _, index=index: order.append(index))
        for index, each in enumerate(step.parameters)
    ]
    step.backward(one_pass(2))
    for handle in handles:
        handle.remove()
    before = values(step)
    spoiled_one = step.parameters[order[5]]
    handle = spoiled_one.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(PartialStepError, match="the gradient of step 2"):
        step(one_pass(2), 0.01)
    handle.remove()
    moved = {index for index, value in enumerate(before[: len(order)]) if not value.equal(step.parameters[index])}
    assert moved == set(order[:5])
    assert all(each.isfinite().all() for each in values(step))
    step(one_pass(3), 0.01)


@OPTIMIZERS
def test_a_shared_parameter_is_stepped_once_and_one_without_gradient_never(name: str) -> None:
    options = OptimOptions.model_validate(
        {"optimizer": name, "max_grad_norm": 0, "optimizer_release_gradients": True, "learning_rate": 0.1}
    )

    def trained(releases: bool) -> tuple[list[Tensor], list[int]]:
        shared, idle, last = (nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4).bfloat16()) for _ in range(3))
        optimizer = optim.build([shared, idle, last], options, seed=3)
        assert isinstance(optimizer, StepsOneParameter)
        release = GradientRelease([shared, idle, last], optimizer, options) if releases else None
        for step in range(3):
            x = torch.full((2, 4), 1.0 + step, dtype=torch.bfloat16)
            loss = (x @ shared @ shared @ last).float().square().mean()
            if release is None:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                release.backward(loss)
        counts = [optimizer.state[each].get("step", 0) for each in (shared, idle, last)]
        return [shared.detach(), idle.detach(), last.detach()], counts

    one, counts = trained(releases=True)
    other, _ = trained(releases=False)
    assert are_equal(one, other)
    assert counts == [3, 0, 3]


def test_adafactor_without_rounding_is_torchs() -> None:
    torch.manual_seed(0)
    shapes = [(6, 10), (300, 700), (33,), (1, 7)]
    ours, theirs = ([nn.Parameter(torch.randn(shape)) for shape in shapes] for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        one.data.copy_(other)
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = AdafactorBf16(ours, **settings), torch.optim.Adafactor(theirs, **settings)  # type: ignore[arg-type]
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_adafactor_rounds_what_it_would_step_to() -> None:
    """The draws are those of seed, step and place; small steps arrive on average, which nearest rounding loses."""
    start = torch.ones(64, 512)
    exact, coarse = nn.Parameter(start.clone()), nn.Parameter(start.bfloat16())
    idle = nn.Parameter(torch.ones(1))
    optimizers = AdafactorBf16([idle, exact], lr=1e-3), AdafactorBf16([idle, coarse], lr=1e-3, seed=7)
    exact.grad = torch.ones_like(exact)
    coarse.grad = torch.ones_like(coarse)
    for optimizer in optimizers:
        optimizer.step()
    bits = noise_bits([(draw_seed(7, "rounding", 1, 1), 0, exact.numel())], CPU).view_as(exact)
    assert torch.equal(coarse, stochastically_rounded(exact.detach(), bits))
    assert coarse.float().mean().item() == pytest.approx(exact.mean().item(), abs=1e-4)
    assert not coarse.equal(start.bfloat16())


def test_adafactors_temporary_memory_does_not_grow_with_the_parameter() -> None:
    for rows in (100, 400):
        parameter = nn.Parameter(torch.zeros(rows, 4096, dtype=torch.bfloat16))
        parameter.grad = torch.zeros_like(parameter)
        optimizer = AdafactorBf16([parameter])
        optimizer.step()
        with Ledger([parameter, parameter.grad, *optimizer.state[parameter].values()][:2]) as ledger:
            optimizer.step()
        assert ledger.peak <= ELEMENT_BYTES * CPU_CHUNK


def test_the_plan_counts_the_temporary_memory_of_a_step() -> None:
    assert STEP_BYTES == {"accelerator": ELEMENT_BYTES * GPU_CHUNK, "ram": ELEMENT_BYTES * CPU_CHUNK}
