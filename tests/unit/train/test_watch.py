"""What is trained in vain is named."""

from pathlib import Path

import pytest
import torch
from tests.host_reads import host_reads

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flux2.full import unfreeze
from simpletuner.flux2.lora import attach
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.runs.layout import RunDirectory
from simpletuner.train.trained import Trainable
from simpletuner.train.watch import FIRST_STEPS, Watch

CPU = torch.device("cpu")
SPEC = TransformerSpec(
    heads=1, head_dim=8, double_blocks=1, single_blocks=2, context_dim=8, guidance_embeds=True, axes=(2, 2, 2, 2)
)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def adapter() -> Trainable:
    return attach(Flux2Transformer(SPEC), LoraOptions(lora_rank=2), seed=0)


def watching(trained: Trainable, told: list[str], start: int = 0) -> Watch:
    return Watch(trained, RunDirectory(Path("run")), told.append, start=start)


def learn(trained: Trainable, *but: str) -> None:
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.removesuffix(".b") not in but:
                parameter.add_(0.01)


def test_adapter_layers_that_learn_nothing_are_named_once_after_ten_steps(adapter: Trainable, told: list[str]) -> None:
    names = [name.removesuffix(".b") for name, _ in adapter.named_parameters() if name.endswith(".b")]
    watch = watching(adapter, told)
    learn(adapter, *names[1:3])
    for _ in range(FIRST_STEPS):
        watch.trained_step(0.0)
    for _ in range(FIRST_STEPS - 1):
        watch.trained_step(1e-4)
    assert not told
    with host_reads(CPU) as reads:
        watch.trained_step(1e-4)
    assert len(reads) == 1
    assert len(told) == 1
    assert told[0].startswith(f"After 10 steps 2 of {len(names)} adapter layers have learned nothing")
    assert f"{names[1]}, {names[2]}." in told[0]
    for _ in range(FIRST_STEPS):
        watch.trained_step(1e-4)
    assert len(told) == 1


def test_adapters_that_learn_are_not_told(adapter: Trainable, told: list[str]) -> None:
    watch = watching(adapter, told)
    learn(adapter)
    for _ in range(FIRST_STEPS):
        watch.trained_step(1e-4)
    assert not told


@pytest.mark.parametrize("make", [lambda model: attach(model, LoraOptions(lora_rank=2), seed=0), unfreeze])
def test_a_checkpoint_equal_to_the_one_before_is_named(make: object, told: list[str]) -> None:
    trained: Trainable = make(Flux2Transformer(SPEC))  # type: ignore[operator]
    learn(trained)
    watch = watching(trained, told, start=5)
    for _ in range(FIRST_STEPS):
        watch.trained_step(1e-4)
    learn(trained)
    watch.saved(15)
    watch.saved(15)
    assert not told
    watch.trained_step(1e-4)
    with host_reads(CPU) as reads:
        watch.saved(16)
    assert len(reads) == 1
    assert told == [
        "run/checkpoints/step-000016 has the same weights as run/checkpoints/step-000015: 1 steps changed nothing. Is "
        "learning_rate too low?"
    ]
    watch.saved(17)
    assert len(told) == 1, "no step at a rate above 0 since"


def test_a_slow_step_is_told_with_where_the_time_went_at_most_once_in_a_hundred(
    adapter: Trainable, told: list[str]
) -> None:
    watch = watching(adapter, told)

    def step(number: int, seconds: float, *, work: float = 1.0, waited: float = 0.0, shapes: str = "a") -> None:
        watch.timed_step(number, shapes, seconds=seconds, waited=waited, tflop_per_s=work / seconds)

    step(1, 500.0)  # compiles
    for number in range(2, 60):
        step(number, 2.0)
    step(60, 90.0, shapes="b")
    step(61, 20.0, work=10.0, shapes="b")  # more work
    step(62, 5.9)
    assert not told
    step(63, 6.1, waited=5.0)
    assert told == [
        "Step 63 took 6.1 s, but its work usually takes 2.0 s (the median of the last 50 steps). It waited "
        "5.0 s for its batch: is the disk of the caches slow?"
    ]
    step(100, 9.0)
    assert len(told) == 1
    step(163, 9.0)
    assert "another program" in told[1]


def test_steps_of_less_than_a_second_are_noise(adapter: Trainable, told: list[str]) -> None:
    watch = watching(adapter, told)
    for number in range(1, 60):
        watch.timed_step(number, "a", seconds=0.1, waited=0.0, tflop_per_s=10.0)
    watch.timed_step(60, "a", seconds=0.9, waited=0.0, tflop_per_s=1.0)
    assert not told
