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
