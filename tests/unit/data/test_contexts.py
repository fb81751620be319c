"""The text cache: compact and exact, in batches that depend on the prompts alone."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simpletuner.base.errors import DataError
from simpletuner.data.cache.contexts import (
    Context,
    ContextEncoder,
    context_key,
    fill_contexts,
    read_context,
)
from simpletuner.data.cache.report import FillReport
from simpletuner.data.cache.store import Store

LENGTH, WIDTH = 16, 8
PAD = torch.linspace(-1, 1, WIDTH, dtype=torch.bfloat16)


class BatchEncoder:
    """One row a letter; every row depends a little on its whole batch, as in bf16."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(prompt) for prompt in prompts]

    def encode(self, prompts: Sequence[str]) -> list[Context]:
        self.batches.append(list(prompts))
        together = sum(map(ord, "".join(prompts)))
        return [Context(self.rows(prompt) + 0.001 * together, PAD, LENGTH) for prompt in prompts]

    @staticmethod
    def rows(prompt: str) -> Tensor:
        letters = torch.tensor([ord(letter) for letter in prompt], dtype=torch.float32)
        return letters.reshape(-1, 1).repeat(1, WIDTH).bfloat16()


def fill(prompts: Sequence[str], store: Store, encoder: ContextEncoder, **sizes: int) -> FillReport:
    sizes = {"batch_size": 2, "write_batch_size": 3} | sizes
    return fill_contexts(prompts, store, "text", lambda: encoder, report=lambda *_: None, **sizes)


def files(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.rglob("*.safetensors")}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "text")


def test_the_padding_is_restored_exactly(store: Store) -> None:
    fill(["abc", ""], store, BatchEncoder())
    context = read_context(store, "abc", "text")
    assert context.rows.shape == (3, WIDTH)
    full = context.full()
    assert full.shape == (LENGTH, WIDTH)
    assert full.dtype == torch.bfloat16
    assert torch.equal(full[-3:], BatchEncoder().encode(["", "abc"])[1].rows)
    assert (full[:-3] == PAD).all()
    assert torch.equal(read_context(store, "", "text").full(), PAD.expand(LENGTH, WIDTH))


def test_a_context_as_long_as_the_window_has_no_padding() -> None:
    rows = torch.randn(LENGTH, WIDTH)
    assert torch.equal(Context(rows, torch.zeros(WIDTH), LENGTH).full(), rows)


def test_batches_are_sorted_by_length_then_text_and_each_prompt_is_encoded_once(store: Store) -> None:
    encoder = BatchEncoder()
    report = fill(["ccc", "a", "bb", "a", "aa", "ccc", ""], store, encoder)
    assert encoder.batches == [["", "a"], ["aa", "bb"], ["ccc"]]
    assert (report.encoded, report.found) == (5, 0)


def test_what_is_missing_is_made_again_with_its_batch_and_is_the_same_bytes(store: Store) -> None:
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    fill(prompts, store, BatchEncoder())
    whole = files(store)
    store.path(context_key("bb", "text")).unlink()
    store.path(context_key("eeeee", "text")).write_bytes(b"damaged")
    encoder = BatchEncoder()
    report = fill(prompts[::-1], store, encoder, write_batch_size=64)
    assert encoder.batches == [["a", "bb"], ["eeeee"]]
    assert (report.encoded, report.found, report.damaged) == (3, 3, 1)
    assert files(store) == whole


def test_an_interruption_leaves_no_trace(store: Store, tmp_path: Path) -> None:
    class Interrupted(BatchEncoder):
        def encode(self, prompts: Sequence[str]) -> list[Context]:
            if len(self.batches) == 3:
                raise KeyboardInterrupt
            return super().encode(prompts)

    prompts = [letter * (1 + number) for number, letter in enumerate("abcdefgh")]
    with pytest.raises(KeyboardInterrupt):
        fill(prompts, store, Interrupted(), write_batch_size=3)
    assert len(files(store)) == 4, "flushed at four, the first multiple of a batch that is three or more"
    fill(prompts, store, BatchEncoder())
    other = Store(tmp_path / "other")
    fill(prompts, other, BatchEncoder())
    assert files(store) == files(other)


def test_a_full_cache_needs_no_encoder(store: Store) -> None:
    fill(["a", "b"], store, BatchEncoder())

    def no_encoder() -> ContextEncoder:
        raise AssertionError("loaded")

    report = fill_contexts(["b"], store, "text", no_encoder, batch_size=2, write_batch_size=2, report=lambda *_: None)
    assert report == FillReport(0, 1, 0, report.seconds)


def test_a_context_that_is_not_finite_is_named(store: Store) -> None:
    class Broken(BatchEncoder):
        def encode(self, prompts: Sequence[str]) -> list[Context]:
            return [Context(torch.full((1, WIDTH), torch.inf), PAD, LENGTH) for _ in prompts]

    with pytest.raises(DataError, match="not finite for 'a'"):
        fill(["a"], store, Broken())


def test_another_encoder_is_another_key(store: Store) -> None:
    fill(["a"], store, BatchEncoder())
    with pytest.raises(DataError, match="is missing"):
        read_context(store, "a", "text in fp32")
    assert context_key("a", "text") != context_key("a ", "text")


def test_progress_counts_what_is_encoded(store: Store) -> None:
    told: list[tuple[int, int]] = []
    fill_contexts(
        ["a", "b", "c"],
        store,
        "text",
        BatchEncoder,
        batch_size=2,
        write_batch_size=8,
        report=lambda done, total: told.append((done, total)),
    )
    assert told == [(0, 3), (2, 3), (3, 3)]


def test_sixty_tokens_take_a_fifth_of_the_plain_tensor_or_less(store: Store) -> None:
    store.write("00", {"rows": torch.zeros(60, 1536), "pad": torch.zeros(1536)}, {})
    assert store.path("00").stat().st_size < 512 * 1536 * 4 / 5
