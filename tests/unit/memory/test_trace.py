"""Passes without numbers, held against passes with them."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.memory import recompute
from simpletuner.memory.trace import Ledger, fuse_attention, on_meta_device, trace, trace_forward


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256, bias=False), nn.SiLU(), nn.Linear(256, 64, bias=False))


def test_a_ledger_counts_storages_once_and_until_they_are_gone() -> None:
    before = torch.empty(10)
    with Ledger([before]) as ledger:
        one = torch.empty(256)
        views = [one.view(16, 16), before.view(5, 2)]
        assert ledger.live == 1024
        two = one * 2
        del one, views
        assert ledger.live == 1024
        assert ledger.peak == 2048
        del two
    assert ledger.live == 0


def test_what_is_kept_is_what_autograd_saves() -> None:
    with on_meta_device(torch.float32):
        module = network()
        cost = trace(
            lambda x: (module(x),), lambda: [torch.empty(8, 64, requires_grad=True)], list(module.parameters())
        )
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    real = network()
    weights = {weight.untyped_storage().data_ptr() for weight in real.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        real(torch.randn(8, 64, requires_grad=True))
    assert cost.saved == sum(size for at, size in saved.items() if at not in weights)
    assert cost.gradients == sum(weight.nbytes for weight in real.parameters())


def test_recomputing_keeps_the_input_alone() -> None:
    def cost(is_recomputed: bool) -> tuple[int, int]:
        with on_meta_device(torch.float32):
            module = network().requires_grad_(False)
            if is_recomputed:
                recompute.install([module])
            found = trace(
                lambda x: (module(x),), lambda: [torch.empty(8, 64, requires_grad=True)], list(module.parameters())
            )
        return found.saved, found.backward

    (kept, backward), (kept_again, backward_again) = cost(is_recomputed=False), cost(is_recomputed=True)
    assert kept_again == 8 * 64 * 4 < kept
    assert backward_again > backward


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_attention_keeps_no_table_of_all_pairs(is_recomputed: bool) -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    tokens = 512
    with on_meta_device(torch.float32):
        module = Attention()
        fuse_attention(module)
        if is_recomputed:
            recompute.install([module])

        def streams() -> list[Tensor]:
            return [torch.empty(1, 2, tokens, 8, requires_grad=True)]

        def run(x: Tensor) -> Sequence[Tensor]:
            return (module(x),)

        cost = trace(run, streams, [])
        forward = trace_forward(run, streams, [])
    assert max(cost.saved, cost.forward, cost.backward, forward) < 2 * tokens * tokens * 4
