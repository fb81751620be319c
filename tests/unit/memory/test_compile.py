"""Compiled blocks, with the backends of torch.compile that need no compiler."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from simpletuner.base.errors import ConfigError
from simpletuner.memory import compile as compilation
from simpletuner.memory import recompute

# Dynamo asks an input for its gradient, and silences this itself wherever warnings are not errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


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


@pytest.mark.parametrize("recomputed", [False, True])
def test_blocks_of_a_kind_share_one_artefact_over_all_shapes(recomputed: bool) -> None:
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


def test_more_artefacts_than_the_bound_are_an_error_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
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
