"""What `dynamo_backend` comes to: for other machines than this one, by what their compiler would say."""

from typing import Any

import pytest
import torch

from simpletuner.base.errors import ConfigError
from simpletuner.config.run import RunConfig
from simpletuner.train.backend import BackendChoice, check_backend, choose_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def works(_device_type: str) -> None:
    return None


def has_no_triton(_device_type: str) -> str:
    return "TritonMissing: no Triton"


def is_not_asked(_device_type: str) -> str:
    raise AssertionError("the compiler was tried, and need not have been")


def test_a_cpu_is_uncompiled_without_a_word_and_without_a_try() -> None:
    assert choose_backend(RunConfig(), CPU, 10_000, is_not_asked) == BackendChoice("no")


def test_a_gpu_compiles_where_it_can_from_201_steps_on() -> None:
    choice = choose_backend(RunConfig(), GPU, 201, works)
    reason = "The blocks are compiled (dynamo_backend = auto): 201 steps repay it."
    assert choice == BackendChoice("inductor", reason)


@pytest.mark.parametrize("steps", [1, 200])
def test_few_steps_are_uncompiled_without_a_try(steps: int) -> None:
    choice = choose_backend(RunConfig(), GPU, steps, is_not_asked)
    assert choice.backend == "no"
    assert choice.reason == (
        f"The blocks are not compiled (dynamo_backend = auto): {steps} steps are too few to repay the "
        "compilation (it takes more than 200)."
    )


def test_blocks_that_deepspeed_gathers_inside_are_uncompiled_without_a_try() -> None:
    choice = choose_backend(RunConfig(deepspeed_config="zero3"), GPU, 201, is_not_asked)
    assert choice.reason.endswith("DeepSpeed's stage 3 gathers weights inside the blocks.")
    assert choose_backend(RunConfig(deepspeed_config="zero2"), GPU, 201, works).backend == "inductor"


def test_a_machine_without_a_compiler_is_uncompiled_and_says_what_it_lacks() -> None:
    choice = choose_backend(RunConfig(), GPU, 201, has_no_triton)
    reason = (
        "The blocks are not compiled (dynamo_backend = auto): this machine cannot compile: TritonMissing: no Triton."
    )
    assert choice == BackendChoice("no", reason)


@pytest.mark.parametrize(
    "option",
    [
        {"group_offload_type": "leaf_level"},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_interval": 2},
    ],
)
def test_blocks_that_are_streamed_otherwise_than_whole_are_uncompiled(option: dict[str, Any]) -> None:
    streamed = RunConfig(enable_group_offload=True)
    assert choose_backend(streamed, GPU, 201, works).backend == "inductor"
    choice = choose_backend(streamed.model_copy(update=option), GPU, 201, is_not_asked)
    assert choice.backend == "no"
    assert f"enable_group_offload with {next(iter(option))} = " in choice.reason
    assert choose_backend(RunConfig(**option), GPU, 201, works).backend == "inductor"


def test_the_users_word_fails_where_it_cannot_be_kept() -> None:
    for backend in ("auto", "no"):
        check_backend(RunConfig(dynamo_backend=backend), GPU, is_not_asked)
    check_backend(RunConfig(dynamo_backend="inductor"), GPU, works)
    with pytest.raises(ConfigError) as caught:
        check_backend(RunConfig(dynamo_backend="inductor"), GPU, has_no_triton)
    assert str(caught.value) == (
        "dynamo_backend = inductor on a machine that cannot compile: TritonMissing: no Triton. Fix that, or give "
        "--dynamo_backend=no to train uncompiled."
    )
