import math
from typing import Any, ClassVar

import pytest
import torch

from simpletuner.base.errors import ConfigError
from simpletuner.config.options.optim import OptimOptions
from simpletuner.memory.masters import Masters
from simpletuner.train import optim


def rates(steps: int = 10, **options: object) -> list[float]:
    chosen = OptimOptions(learning_rate=1.0, **options)  # type: ignore[arg-type]
    return [optim.learning_rate(chosen, step, steps) for step in range(1, steps + 1)]


def test_constant_has_no_warm_up() -> None:
    assert rates(lr_scheduler="constant", lr_warmup_steps=5) == [1.0] * 10


def test_warm_up_rises_evenly_to_the_whole_rate_and_stays() -> None:
    assert rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=4) == [0.25, 0.5, 0.75] + [1.0] * 7


@pytest.mark.parametrize(
    ("scheduler", "shape"),
    [
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("polynomial", lambda p: (1 - p) ** 0.8),
        ("sine", lambda p: math.sin(math.pi * p)),
    ],
)
def test_the_shape_covers_what_is_left_after_the_warm_up(scheduler: str, shape) -> None:  # type: ignore[no-untyped-def]
    found = rates(steps=12, lr_scheduler=scheduler, lr_warmup_steps=2)
    assert found[:2] == [0.5, 1.0]
    assert found[2:] == pytest.approx([shape(step / 10) for step in range(10)])


def test_restarts_return_to_the_top() -> None:
    found = rates(lr_scheduler="cosine_with_restarts", lr_num_cycles=2)
    assert found[0] == found[5] == 1.0
    assert found[:5] == pytest.approx(found[5:])


def test_a_falling_schedule_ends_near_lr_end() -> None:
    found = rates(steps=1000, lr_scheduler="cosine", lr_end=0.25)
    assert found[0] == 1.0
    assert found[-1] == pytest.approx(0.25, abs=1e-4)
    assert min(found) >= 0.25


def test_every_schedule_of_the_options_is_there() -> None:
    names = OptimOptions.model_fields["lr_scheduler"].annotation.__args__  # type: ignore[union-attr]
    assert set(optim.SCHEDULES) == set(names)


def test_an_argument_the_optimizer_does_not_know_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="optimizer_config"):
        optim.build([torch.nn.Parameter(torch.zeros(1))], OptimOptions(optimizer_config={"momentum": 0.9}))


def test_the_optimizers_own_arguments_win() -> None:
    optimizer = optim.build([torch.nn.Parameter(torch.zeros(1))], OptimOptions(optimizer_config={"weight_decay": 0.5}))
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def parameters(*gradients: float) -> list[torch.nn.Parameter]:
    found = []
    for value in gradients:
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.tensor([value])
        found.append(parameter)
    return found


def gradients_of(found: list[torch.nn.Parameter]) -> list[float]:
    return [parameter.grad.item() for parameter in found if parameter.grad is not None]


def test_the_norm_is_over_all_parameters_and_told_before_clipping() -> None:
    found = parameters(3.0, 4.0)
    assert optim.clip(found, OptimOptions(max_grad_norm=1.0)).item() == pytest.approx(5.0)
    assert gradients_of(found) == pytest.approx([0.6, 0.8])


def test_a_small_gradient_keeps_its_bits() -> None:
    found = parameters(0.3, 0.4)
    optim.clip(found, OptimOptions(max_grad_norm=1.0))
    assert gradients_of(found) == [torch.tensor(0.3).item(), torch.tensor(0.4).item()]


def test_zero_clips_nothing_and_value_clips_each() -> None:
    found = parameters(30.0, -40.0)
    assert optim.clip(found, OptimOptions(max_grad_norm=0.0)).item() == pytest.approx(50.0)
    assert gradients_of(found) == [30.0, -40.0]
    optim.clip(found, OptimOptions(max_grad_norm=1.0, grad_clip_method="value"))
    assert gradients_of(found) == [1.0, -1.0]


def test_a_scaled_rate_goes_by_the_effective_batch() -> None:
    batch = {"train_batch_size": 2, "gradient_accumulation_steps": 8, "lr_scheduler": "linear", "lr_end": 0.1}
    for options, scale in (({"lr_scale": True}, 16.0), ({"lr_scale_sqrt": True}, 4.0), ({}, 1.0)):
        found = rates(**batch, **options)
        assert found[0] == scale
        assert found[-1] == pytest.approx(scale * (0.1 + 0.9 * 0.1))
    both = OptimOptions(lr_scale=True, lr_scale_sqrt=True, train_batch_size=4)
    assert both.rate_scale == 2.0


def named() -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, torch.nn.Parameter(torch.ones(2, 2))) for name in ("one.a", "one.b", "two.a", "two.b")]


def test_lora_plus_gives_b_a_rate_of_its_own() -> None:
    everything = named()
    (slow, fast) = optim.build(optim.lora_plus(everything, 16.0), OptimOptions()).param_groups
    assert [id(p) for p in slow["params"]] == [id(p) for name, p in everything if name.endswith(".a")]
    assert [id(p) for p in fast["params"]] == [id(p) for name, p in everything if name.endswith(".b")]
    assert (slow[optim.RATIO], fast[optim.RATIO]) == (1.0, 16.0)


def test_a_ratio_of_one_is_one_group_in_the_adapters_order() -> None:
    everything = named()
    (group,) = optim.build(optim.lora_plus(everything, 1.0), OptimOptions()).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for _, p in everything]


def test_a_library_without_that_name_suggests_one() -> None:
    with pytest.raises(ConfigError, match=r"torch:nadam"):
        optim.build(named()[0][1:], OptimOptions(optimizer="torch:nadamm"))


@pytest.mark.parametrize("name", ["torch:lbfgs", "torch:sparseadam"])
def test_one_that_gradients_alone_cannot_drive_is_refused_before_the_first_step(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used here"):
        optim.build(named()[0][1:], OptimOptions(optimizer=name))


class Forgetful(torch.optim.SGD):
    """Keeps a count where nobody saves it."""

    count = 0

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # noqa: ARG002
        self.count += 1
        for parameter in self.param_groups[0]["params"]:
            parameter.data -= 0.1 * self.count


def test_one_that_forgets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "Forgetful", Forgetful, raising=False)
    with pytest.raises(ConfigError, match="does not continue exactly"):
        optim.build(named()[0][1:], OptimOptions(optimizer="torch:forgetful"))


def test_an_argument_that_a_library_would_swallow_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no nestrov; it takes .*betas"):
        optim.build(named()[0][1:], OptimOptions(optimizer="pytorch_optimizer:adan", optimizer_config={"nestrov": 1}))


def test_an_optimizers_own_betas_stand_in_for_those_not_given() -> None:
    def betas(**options: object) -> object:
        return optim.build(named()[0][1:], OptimOptions(**options)).param_groups[0]["betas"]  # type: ignore[arg-type]

    assert betas() == (0.9, 0.999)
    assert betas(optimizer="lion") == (0.9, 0.99)
    assert betas(optimizer="lion", optimizer_beta1=0.95) == (0.95, 0.99)
    assert betas(optimizer="came", optimizer_beta2=0.99) == (0.9, 0.99, 0.9999)


def test_muon_is_for_matrices() -> None:
    with pytest.raises(ConfigError, match="muon rejects"):
        optim.build([torch.nn.Parameter(torch.zeros(3))], OptimOptions(optimizer="muon"))


def test_looking_at_a_schedule_free_run_changes_none_of_its_bits() -> None:
    def trained(look: bool) -> tuple[torch.Tensor, torch.Tensor]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8))
        optimizer = optim.build([parameter], OptimOptions(optimizer="adamw_schedulefree", learning_rate=0.1))
        for step in range(6):
            parameter.grad = torch.sin(torch.arange(64.0) * step).view(8, 8)
            optimizer.step()
            if look:
                with optim.averaged_weights(optimizer):
                    pass
        before = parameter.detach().clone()
        with optim.averaged_weights(optimizer):
            given = parameter.detach().clone()
        assert torch.equal(before, parameter)
        return before, given

    (plain, average), (looked, again) = trained(False), trained(True)
    assert torch.equal(plain, looked)
    assert torch.equal(average, again)
    assert not torch.equal(plain, average)


def model() -> list[dict[str, Any]]:
    """Groups of a small whole model."""
    inner, outer, scales = (torch.nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (4, 8), (4,)))
    return optim.by_role([inner], [outer], [scales])


def stepped(gradient: float = 0.0, **options: object) -> list[torch.Tensor]:
    groups = model()
    optimizer = optim.build(groups, OptimOptions(learning_rate=0.1, **options))  # type: ignore[arg-type]
    found = [group["params"][0] for group in groups]
    for parameter in found:
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return [parameter.detach() for parameter in found]


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "muon", "adafactor", "lion", "came"])
def test_norms_are_not_decayed(name: str) -> None:
    inner, outer, scales = stepped(optimizer=name, adam_weight_decay=0.5)
    assert (inner < 1).all()
    assert (outer < 1).all()
    assert torch.equal(scales, torch.ones(4))


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    inner, outer, scales = stepped(1.0, optimizer="muon", adam_weight_decay=0.0)
    alone = optim.build([torch.nn.Parameter(torch.ones(6, 4))], OptimOptions(optimizer="muon", learning_rate=0.1))
    (parameter,) = alone.param_groups[0]["params"]
    alone.param_groups[0]["weight_decay"] = 0.0
    parameter.grad = torch.ones(6, 4)
    alone.step()
    assert torch.equal(inner, parameter)
    torch.testing.assert_close(outer, torch.full((4, 8), 0.9))  # Adam's first step is the rate
    torch.testing.assert_close(scales, torch.full((4,), 0.9))


def test_both_parts_of_muon_obey_the_schedule_and_keep_one_state() -> None:
    groups = model()
    optimizer = optim.build(groups, OptimOptions(optimizer="muon"))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert len(optimizer.state) == 3
    assert all(torch.equal(group["params"][0], torch.ones_like(group["params"][0])) for group in groups)


@pytest.mark.parametrize(
    "name",
    [pytest.param("pytorch_optimizer:muon", marks=pytest.mark.slow), "pytorch_optimizer:adan", "torch:radam"],
)
def test_one_of_a_library_is_rehearsed_with_vectors_too(name: str) -> None:
    groups = model()
    built = optim.build(groups, OptimOptions(optimizer=name))
    assert sum(len(group["params"]) for group in built.param_groups) == 3


class Recording(torch.optim.SGD):
    """Notes the sizes that it was tried on."""

    sizes: ClassVar[list[list[int]]] = []

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.sizes.append([parameter.numel() for group in self.param_groups for parameter in group["params"]])


class ForgettingLarge(Recording):
    """Keeps what it has of a large tensor outside of its state."""

    def step(self) -> None:  # type: ignore[override]
        for parameter in (each for group in self.param_groups for each in group["params"]):
            count = self.__dict__.setdefault(f"count{parameter.numel()}", 0) + 1
            if parameter.numel() >= 100_000:
                self.__dict__[f"count{parameter.numel()}"] = count
            parameter.data.add_(parameter.grad, alpha=-0.1 * count)


class FailingLarge(Recording):
    """Fails on a large tensor."""

    def step(self) -> None:  # type: ignore[override]
        if max(self.sizes[-1]) >= 100_000:
            raise RuntimeError("too large")
        super().step()


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    """`torch:recording` and its like are optimizers of a library."""
    for kind in (Recording, ForgettingLarge, FailingLarge):
        monkeypatch.setattr(torch.optim, kind.__name__, kind, raising=False)
    monkeypatch.setattr(Recording, "sizes", [])
    return Recording


def test_a_rehearsal_has_one_tensor_that_is_large_enough_to_be_paged(offered: type[Recording]) -> None:
    optim.build(model(), OptimOptions(optimizer="torch:recording"))
    *rehearsed, used = offered.sizes
    assert len(rehearsed) == 2, "the one that goes on, and the one that is restored"
    for sizes in rehearsed:
        assert len([size for size in sizes if size >= 100_000]) == 1
    assert max(used) < 100_000


@pytest.mark.usefixtures("offered")
def test_state_of_large_tensors_that_is_not_saved_is_found() -> None:
    with pytest.raises(ConfigError, match="torch:forgettinglarge: after saving and restoring, it does not continue"):
        optim.build(model(), OptimOptions(optimizer="torch:forgettinglarge"))


def test_what_fails_on_large_tensors_is_refused_where_the_run_has_one(offered: type[Recording]) -> None:
    optim.build(model(), OptimOptions(optimizer="torch:failinglarge"))
    assert max(offered.sizes[-1]) < 100_000
    large = torch.nn.Parameter(torch.zeros(1000, 200))
    with pytest.raises(ConfigError, match=r"torch:failinglarge: it cannot be used here \(RuntimeError: too large\)"):
        optim.build([*model(), {"params": [large], optim.RATIO: 1.0}], OptimOptions(optimizer="torch:failinglarge"))


def test_a_default_optimizer_is_not_rehearsed(offered: type[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "PRESET", {})
    monkeypatch.setattr(torch.optim, "AdamW", type("AdamW", (Recording,), {"__init__": noting}))
    optim.build(model(), OptimOptions())
    assert len(offered.sizes) == 1


def noting(self: Recording, params: Any, lr: float = 0.1, **_given: Any) -> None:
    Recording.__init__(self, params, lr)


def test_masters_follow_what_a_schedule_free_optimizer_gives() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    masters = Masters(dict(layer.named_parameters()), torch.bfloat16)
    (master,) = masters.parameters.values()
    optimizer = optim.build([master], OptimOptions(optimizer="adamw_schedulefree", learning_rate=0.1))
    for step in range(4):
        master.grad = torch.sin(torch.arange(16.0) * step).view(4, 4)
        optimizer.step()
        masters.update_weights()
    before = layer.weight.detach().clone()
    with optim.averaged_weights(optimizer, masters):
        assert torch.equal(layer.weight, master.bfloat16())
        assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before)
