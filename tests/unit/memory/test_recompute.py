import weakref

import pytest
import torch
from torch import nn

from simpletuner.memory import recompute


def stack(seed: int = 0) -> nn.ModuleList:
    torch.manual_seed(seed)
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.GELU()) for _ in range(4))


def run(blocks: nn.ModuleList) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    x = torch.randn(3, 8)
    for block in blocks:
        x = block(x)
    x.square().sum().backward()
    return x.detach(), [parameter.grad for parameter in blocks.parameters() if parameter.grad is not None]


def test_recomputing_changes_no_bit_of_result_or_gradient() -> None:
    plain = run(stack())
    for keep_every in (None, 2, 3):
        blocks = stack()
        recompute.install(list(blocks), keep_every)
        again = run(blocks)
        assert torch.equal(plain[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))


def test_without_draws_no_state_of_a_generator_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    plainly = torch.get_rng_state

    def counted() -> torch.Tensor:
        nonlocal read
        read += 1
        return plainly()

    def dry() -> nn.ModuleList:
        blocks = stack()
        for block in blocks:
            block[1].p = 0.0
        return blocks

    expected = run(dry())
    monkeypatch.setattr(torch, "get_rng_state", counted)
    for draws in (True, False):
        blocks, read = dry(), 0
        recompute.install(list(blocks), draws=draws)
        found = run(blocks)
        assert (read > 0) is draws
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_every_nth_block_keeps_its_activations() -> None:
    for keep_every, expected in ((None, 8), (2, 6), (3, 7)):
        blocks = stack()
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        for block in blocks:
            block[0].register_forward_hook(count)
        recompute.install(list(blocks), keep_every)
        run(blocks)
        assert calls == expected


def test_nothing_is_recomputed_without_gradients() -> None:
    blocks = stack()
    recompute.install(list(blocks))
    with torch.no_grad():
        x = torch.randn(3, 8)
        for block in blocks:
            x = block(x)
    assert not x.requires_grad


def grown(blocks: nn.ModuleList) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As `run`, of two passes before the gradient, and with one without gradients in between."""
    torch.manual_seed(1)
    total = torch.zeros(())
    for _ in range(2):
        x = torch.randn(3, 8)
        for block in blocks:
            x = block(x)
        total = total + x.square().sum()
        with torch.no_grad():
            blocks[0](torch.randn(3, 8))
    total.backward()
    return total.detach(), [parameter.grad for parameter in blocks.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("keep_every", [None, 2, 3])
def test_inputs_on_the_host_change_no_bit(keep_every: int | None) -> None:
    for way in (run, grown):
        expected = way(stack())
        blocks = stack()
        inputs = recompute.HostInputs(torch.device("cpu"), ahead=True)
        recompute.install(list(blocks), keep_every, inputs=inputs)
        found = way(blocks)
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
        # Of the first block nothing wants a gradient; each other one's input is three rows of eight fp32 numbers.
        recomputed = [index for index in range(4) if keep_every is None or (index + 1) % keep_every]
        passes = 2 if way is grown else 1
        assert inputs.copied_bytes == passes * sum(index > 0 for index in recomputed) * 3 * 8 * 4


class Shared(nn.Module):
    """Two streams and something that all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + gain * self.linear(y), y * 2


def test_what_went_to_the_host_is_let_go_on_the_device_and_comes_back_once() -> None:
    torch.manual_seed(0)
    blocks = [Shared() for _ in range(3)]
    inputs = recompute.HostInputs(torch.device("cpu"))
    recompute.install(blocks, inputs=inputs)
    x, y = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)
    gain = torch.ones(8)
    seen: list[weakref.ref[torch.Tensor]] = []
    for block in blocks:
        x, y = block(x, y, gain)
        seen.append(weakref.ref(x))
    # The stream that wants a gradient: of the first block its leaf, then what blocks gave. `y` never wants one.
    assert inputs.copied_bytes == 3 * x.nbytes
    assert [ref() is None for ref in seen] == [True, True, False]
    x.sum().backward()
    assert blocks[0].linear.weight.grad is not None


def test_an_error_in_a_block_leaves_no_hook_behind() -> None:
    blocks = stack()
    recompute.install(list(blocks), inputs=recompute.HostInputs(torch.device("cpu")))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        blocks[0](torch.randn(3, 5))
    fresh = stack()
    recompute.install(list(fresh), inputs=recompute.HostInputs(torch.device("cpu")))
    assert torch.equal(run(fresh)[0], run(stack())[0])
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
