"""A condition keeps its values wherever it goes, however its rows are held."""

import pytest
import torch
from torch import Tensor

from simpletuner.flow.condition import Condition, TextContext


def rows(seed: int, count: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def padded_left(seed: int, tokens: int, length: int = 5) -> tuple[TextContext, Tensor]:
    """A context whose padding rows are alike and held once, and what it stands for."""
    own, pad = rows(seed, tokens), rows(99, 1)
    index = torch.tensor([[0] * (length - tokens) + list(range(1, tokens + 1))])
    return TextContext(torch.cat([pad, own]), index), torch.cat([pad] * (length - tokens) + [own])[None]


def padded_right(seed: int, length: int = 5) -> tuple[TextContext, Tensor]:
    """A context whose padding rows all differ, as a right-padding encoder makes them."""
    context = rows(seed, length)[None]
    return TextContext.dense(context), context


@pytest.mark.parametrize(
    "contexts",
    [
        pytest.param([padded_left(0, 2), padded_left(1, 4)], id="padding alike"),
        pytest.param([padded_right(0), padded_right(1)], id="padding that differs"),
        pytest.param([padded_left(0, 3), padded_right(1), padded_left(2, 5)], id="both"),
    ],
)
def test_stacked_contexts_expand_to_the_samples_bit_for_bit(contexts: list[tuple[TextContext, Tensor]]) -> None:
    stacked = TextContext.stacked([context for context, _ in contexts])
    expected = torch.cat([full for _, full in contexts])
    assert torch.equal(stacked.expanded(), expected)
    assert torch.equal(stacked.expanded(torch.bfloat16), expected.bfloat16())
    last_and_first = torch.tensor([len(contexts) - 1, 0])
    assert torch.equal(stacked.select(last_and_first).expanded(), expected[last_and_first])


def test_padding_rows_that_are_alike_are_held_once() -> None:
    stacked = TextContext.stacked([padded_left(0, 2)[0], padded_left(1, 4)[0]])
    assert stacked.rows.shape == (2 + 6, 6)
    assert stacked.index.shape == (2, 5)


def test_contexts_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"contexts of different lengths: \[5, 6\]"):
        TextContext.stacked([padded_left(0, 2)[0], padded_right(1, length=6)[0]])


def test_a_condition_takes_every_field_along() -> None:
    context, full = padded_left(0, 2)
    condition = Condition(TextContext.stacked([context, context]), torch.tensor([1.0, 4.0]))
    moved = condition.mapped(lambda tensor: tensor.to("meta"))
    assert {moved.context.rows.device, moved.context.index.device, moved.guidance.device} == {torch.device("meta")}
    chosen = condition.mapped(Tensor.clone).select(torch.tensor([1]))
    assert torch.equal(chosen.context.expanded(), full)
    assert torch.equal(chosen.guidance, torch.tensor([4.0]))


def test_one_guidance_stands_for_every_sample() -> None:
    context, _ = padded_right(0)
    condition = Condition.at(TextContext.stacked([context, context, context]), 2.5)
    assert torch.equal(condition.guidance, torch.tensor([2.5, 2.5, 2.5]))
    assert condition.context.index.shape == (3, 5)
