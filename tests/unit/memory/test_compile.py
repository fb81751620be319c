"""Compiled blocks, with the backends of torch.compile that need no compiler."""

import gc
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.tiers import others_slow
from tests.unit.memory.test_offload import CPU, WIDTH, HiddenLinear, Model, assert_same, batch, train, weights_alive
from torch import Tensor, nn

from simpletuner.base.errors import ConfigError
from simpletuner.memory import compile as compilation
from simpletuner.memory import offload, recompute

# Dynamo asks an input for its gradient, and makes an object of a product's class; it silences both itself wherever
# warnings are not errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x + gain * self.drop(torch.tanh(self.linear(x)))


class Narrow(Wide):
    def forward(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x - gain * torch.tanh(self.linear(x))


class Stubborn(Wide):
    def forward(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + gain


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stack() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([*(Wide() for _ in range(3)), *(Narrow() for _ in range(3))])


def run(blocks: nn.ModuleList, *shape: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    x, gain = torch.randn(*shape, 8), torch.ones(1)
    for block in blocks:
        x = block(x, gain)
    blocks.zero_grad()
    x.square().mean().backward()
    return x.detach(), [parameter.grad.clone() for parameter in blocks.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("recomputed", others_slow([False, True], True))
def test_blocks_of_a_kind_share_one_artifact_over_all_shapes(recomputed: bool) -> None:
    plain, blocks = stack(), stack()
    compiled = compilation.install(list(blocks), backend="aot_eager")
    if recomputed:
        recompute.install(list(blocks))
    assert (compiled.count, compiled.kinds, compiled.bound) == (0, 2, 32)
    for shape in ((2, 5), (2, 9), (3, 8), (7, 8)):
        expected, found = run(plain, *shape), run(blocks, *shape)
        # To 1e-6: traced through, dropout scales and masks in another order.
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
        for ours, theirs in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert compiled.count == 3  # the first block's input wants no gradient
    assert str(compiled).startswith("3 compilations of 2 kinds of block (at most 32) by aot_eager, ")


def test_in_evaluation_blocks_are_not_compiled() -> None:
    plain, blocks = stack().eval(), stack().eval()
    compiled = compilation.install(list(blocks), backend="eager")
    assert torch.equal(run(blocks, 2, 5)[0], run(plain, 2, 5)[0])
    assert compiled.count == 0


def test_switched_off_blocks_are_the_uncompiled_ones_bit_for_bit() -> None:
    plain, blocks = stack(), stack()
    compiled = compilation.install(list(blocks), backend="eager")
    compiled.is_on = False
    expected, found = run(plain, 2, 5), run(blocks, 2, 5)
    assert_same([found[0], *found[1]], [expected[0], *expected[1]])
    assert compiled.count == 0


def test_a_machine_that_cannot_compile_says_why() -> None:
    assert compilation.probe_compiler("cpu", 0.01) == "a test compilation took more than 0.01 s"
    if not torch.cuda.is_available():
        lack = compilation.probe_compiler("cuda", 200.0)
        assert lack is not None
        assert "CUDA" in lack or "NVIDIA" in lack


@pytest.mark.slow
def test_a_machine_that_can_compile_lacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert compilation.probe_compiler("cpu", 300.0) is None


def test_a_compiler_for_a_cpu_is_looked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    assert compilation.compiler_problem("cpu") is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compilation.compiler_problem("cpu") == "there is no C++ compiler no-such-compiler (CXX names another)"


def test_what_differs_inside_is_another_kind() -> None:
    blocks = stack()
    blocks[0].linear = nn.Linear(8, 8, bias=False)
    compiled = compilation.install(list(blocks), backend="eager", sizes_vary=False)
    assert (compiled.kinds, compiled.bound) == (3, 96)
    run(blocks, 2, 5)
    first = compiled.count
    for shape in ((2, 6), (2, 7), (2, 8)):
        run(blocks, *shape)
    assert first < compiled.count <= 2 * first  # made once for the one shape, once more for all


def test_what_cannot_be_compiled_is_an_error_that_names_the_way_out() -> None:
    blocks = nn.ModuleList([Stubborn()])
    compiled = compilation.install(list(blocks), backend="eager")
    with (
        pytest.raises(ConfigError, match=r"dynamo_backend = eager: .* cannot be compiled: .*--dynamo_backend=no"),
        compiled.failures_are_explained(),
    ):
        run(blocks, 2, 5)


def test_more_artifacts_than_the_bound_are_an_error_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "VARIANTS", 1)
    blocks = stack()
    compiled = compilation.install(list(blocks), backend="eager")
    with pytest.raises(ConfigError, match="cannot be compiled: Hard failure"), compiled.failures_are_explained():
        run(blocks, 2, 5)  # needs two: the first block's input wants no gradient
    assert compiled.bound == 2


def test_other_errors_are_left_alone() -> None:
    compiled = compilation.install(list(stack()), backend="eager")
    with pytest.raises(ZeroDivisionError), compiled.failures_are_explained():
        _ = 1 / 0


def test_a_block_that_is_wrapped_already_is_refused() -> None:
    blocks = list(stack())
    recompute.install(blocks)
    with pytest.raises(ValueError, match="a Wide is wrapped already"):
        compilation.install(blocks, backend="eager")


def test_inputs_on_the_host_go_with_compiled_blocks() -> None:
    found = []
    for inputs in (None, recompute.HostInputs(torch.device("cpu"))):
        blocks = stack()
        compilation.install(list(blocks), backend="aot_eager")
        recompute.install(list(blocks), inputs=inputs)
        result, gradients = run(blocks, 2, 5)
        found.append([result, *gradients])
        assert inputs is None or inputs.copied_bytes == 5 * result.nbytes
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def compiled_model(
    kind: str, per_group: int | None = None, *, ahead: bool = False, backend: str = "aot_eager"
) -> Model:
    """A model of compiled blocks that are recomputed whole; streamed where a group has a number of blocks."""
    import torch._dynamo

    torch._dynamo.reset()
    model = Model(kind)
    blocks = list(model.blocks)
    compilation.install(blocks, backend=backend)
    if per_group is not None:
        offload.install(model, offload.block_groups(blocks, per_group), device=CPU, ahead=ahead)
    recompute.install(blocks)
    return model


def passes_in_any_order(model: Model, seed: int) -> list[Tensor]:
    """Training passes, passes without gradients, in evaluation too, single blocks, gradients much later than their pass
    and in another order: as many of each as `seed` draws.
    """
    draw = random.Random(seed)
    found: list[Tensor] = []
    waiting: list[Tensor] = []
    for number in range(24):
        x = batch(number)[: 2 + number % 2]
        action = draw.choice(("forward", "forward", "backward", "evaluation", "no gradients", "one block"))
        if action == "forward":
            waiting.append(model(x).square().mean())
        elif action == "backward" and waiting:
            waiting.pop(draw.randrange(len(waiting))).backward()
            found += [parameter.grad.clone() for parameter in model.trained if parameter.grad is not None]
        elif action == "evaluation":
            model.eval()
            with torch.no_grad():
                found.append(model(x))
            model.train()
        elif action == "no gradients":
            with torch.no_grad():
                found.append(model(x))
        elif action == "one block":
            found.append(model.blocks[draw.randrange(5)](x, torch.zeros(WIDTH)).detach())
    return found


WAYS = ((1, False), (1, True), (2, False), (2, True))
"""Blocks of a group, and whether the next one is copied ahead, into a second slot."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "hidden"])
def test_compiled_streamed_steps_are_the_compiled_resident_ones_bit_for_bit(kind: str) -> None:
    expected = train(compiled_model(kind), 2)
    for per_group, ahead in WAYS:
        assert_same(train(compiled_model(kind, per_group, ahead=ahead), 2), expected)


@pytest.mark.slow
def test_compiled_streamed_passes_in_any_order_are_the_resident_ones_bit_for_bit() -> None:
    resident = compiled_model("plain")
    expected = [passes_in_any_order(resident, seed) for seed in range(3)]
    for per_group, ahead in ((1, False), (1, True)):
        streamed = compiled_model("plain", per_group, ahead=ahead)
        for seed, each in enumerate(expected):
            assert_same(passes_in_any_order(streamed, seed), each)


@pytest.mark.parametrize("ahead", others_slow([None, False, True], True), ids=["resident", "in turn", "ahead"])
def test_streaming_adds_no_compilation(ahead: bool | None) -> None:
    """Weights come and go as other tensors each time: of the same shapes, in another place."""
    blocks = list((model := Model()).blocks)
    compiled = compilation.install(blocks, backend="aot_eager")
    if ahead is not None:
        offload.install(model, offload.block_groups(blocks, 2), device=CPU, ahead=ahead)
    recompute.install(blocks)
    train(model, 2)
    assert compiled.count == 2  # the first block's input wants no gradient


@pytest.mark.parametrize("ahead", [False, True])
def test_a_compiled_gradient_finds_weights_that_passed_no_hook(ahead: bool) -> None:
    """What a library's product puts aside, a compiled graph puts aside too, past autograd's hooks and the recompute.
    Here it is all there is to save: only the gradient of a block's result can bring the block's group.
    """
    found = []
    for is_streamed in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        layers = [HiddenLinear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(5)]
        compilation.install(layers, backend="aot_eager")
        if is_streamed:
            offload.install(nn.ModuleList(layers), offload.block_groups(layers), device=CPU, ahead=ahead)
        recompute.install(layers)
        x = first = batch(0).requires_grad_()
        for layer in layers:
            x = layer(x)
        x.square().sum().backward()
        found.append(first.grad)
    assert torch.equal(*found)


def test_between_its_passes_a_compiled_streamed_block_keeps_what_an_uncompiled_one_keeps() -> None:
    kept = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        blocks = list((model := Model()).blocks)
        if is_compiled:
            compilation.install(blocks, backend="aot_eager")
        offload.install(model, offload.block_groups(blocks), device=CPU, ahead=True)
        recompute.install(blocks)
        model(batch(0)).square().mean().backward()
        gc.collect()
        before = weights_alive()
        loss = model(batch(0)).square().mean()
        kept.append(weights_alive() - before)
        loss.backward()
    assert abs(kept[1] - kept[0]) < batch(0).nbytes  # less than one activation


# Of torch itself, when inductor is first imported in a process.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["plain", "transposed", "hidden"])
def test_by_inductor_streamed_passes_are_the_resident_ones_bit_for_bit(kind: str) -> None:
    expected = train(compiled_model(kind, backend="inductor"), 2)
    shuffled = passes_in_any_order(compiled_model(kind, backend="inductor"), 0)
    for per_group, ahead in ((1, False), (1, True), (2, True)):
        assert_same(train(compiled_model(kind, per_group, ahead=ahead, backend="inductor"), 2), expected)
        found = passes_in_any_order(compiled_model(kind, per_group, ahead=ahead, backend="inductor"), 0)
        assert_same(found, shuffled)
