"""The real command as two processes that fill the caches together."""

import sys

import pytest
from tests.ranks import together
from tests.recipes.conftest import Workplace, tensors_below


@pytest.mark.slow
def test_two_ranks_fill_the_caches_of_one_and_tell_it_once(
    workplace: Workplace, uninterrupted: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.ranks.TIMEOUT_S", 300.0)
    workplace.write()
    flags = ("--gradient_accumulation_steps=1", "--max_train_steps=1", "--text_encoder_mode=streamed")
    first, second = together(2, [sys.executable, "-m", "simpletuner", "train", *flags])
    assert (first.exit_code, second.exit_code) == (0, 0), first.err + second.err
    for cache in ("vae", "text"):
        whole = tensors_below(uninterrupted.folder / "cache" / cache)
        assert tensors_below(workplace.folder / "cache" / cache) == whole
    assert first.out.count("Captions: 7 encoded") == 1, "six captions and the empty one"
    assert first.out.count("Images: 6 encoded") == 1
    assert "encoded" not in second.out + second.err
    assert [event["done"] for event in workplace.events("progress") if event["phase"] == "text"][-1] == 7
