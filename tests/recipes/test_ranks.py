"""The real command as several processes."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from tests.ranks import together
from tests.recipes.conftest import Workplace


def train_together(place: Workplace, size: int, *flags: str) -> None:
    place.write()
    ended = together(size, [sys.executable, "-m", "simpletuner", "train", *flags])
    assert [each.exit_code for each in ended] == [0] * size, "\n".join(each.err for each in ended)
    assert [each.out for each in ended[1:]] == [""] * (size - 1)


@pytest.mark.slow
def test_two_ranks_are_two_accumulated_batches_to_the_bit(cached_workplace: Workplace) -> None:
    place = cached_workplace
    train_together(place, 1, "--output_dir=output/alone")
    train_together(place, 2, "--gradient_accumulation_steps=1")
    assert place.losses() == place.losses("alone")
    ours, alone = (load_file(place.run(name).lora) for name in ("run", "alone"))
    assert ours.keys() == alone.keys()
    assert all(torch.equal(ours[name], alone[name]) for name in ours)
