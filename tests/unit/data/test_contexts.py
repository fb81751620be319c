"""The text cache: compact and exact, in batches that depend on the prompts alone."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tests.thread_ranks import ALONE, on_ranks
from torch import Tensor

from simpletuner.base.errors import DataError, DiskError
from simpletuner.base.machine import free_disk_bytes
from simpletuner.base.storage import LocalStorage
from simpletuner.data.cache import store as store_module
from simpletuner.data.cache.contexts import (
    ContextEncoder,
    context_key,
    fill_contexts,
    read_context,
)
from simpletuner.data.cache.report import FillReport
from simpletuner.data.cache.store import Store
from simpletuner.flow.condition import TextContext
from simpletuner.flux2.text import LeftPaddedCodec, RightPaddedCodec, left_padded
from simpletuner.memory.world import World

LENGTH, WIDTH = 16, 8
CODEC = LeftPaddedCodec("text")
PAD = torch.linspace(-1, 1, WIDTH, dtype=torch.bfloat16)


class BatchEncoder:
    """One row a letter; every row depends a little on its whole batch, as in bf16."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(prompt) for prompt in prompts]

    def encode_batches(
        self, batches: Sequence[Sequence[str]], _report: Callable[[float], None]
    ) -> Iterator[list[TextContext]]:
        for batch in batches:
            yield self.encode(batch)

    def encode(self, prompts: Sequence[str]) -> list[TextContext]:
        self.batches.append(list(prompts))
        together = sum(map(ord, "".join(prompts)))
        return [left_padded(self.rows(prompt) + 0.001 * together, PAD, LENGTH) for prompt in prompts]

    @staticmethod
    def rows(prompt: str) -> Tensor:
        letters = torch.tensor([ord(letter) for letter in prompt], dtype=torch.float32)
        return letters.reshape(-1, 1).repeat(1, WIDTH).bfloat16()


def fill(prompts: Sequence[str], store: Store, encoder: ContextEncoder, **sizes: int) -> FillReport:
    sizes = {"batch_size": 2, "write_batch_size": 3} | sizes
    return fill_contexts(prompts, store, CODEC, lambda: encoder, report=lambda *_: None, world=ALONE, **sizes)


def files(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.storage.folder.rglob("*.safetensors")}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LocalStorage(tmp_path / "text"))


def test_the_padding_is_restored_exactly(store: Store) -> None:
    fill(["abc", ""], store, BatchEncoder())
    context = read_context(store, "abc", CODEC)
    assert context.rows.shape == (1 + 3, WIDTH)
    (full,) = context.expanded()
    assert full.shape == (LENGTH, WIDTH)
    assert full.dtype == torch.bfloat16
    assert torch.equal(full[-3:], BatchEncoder().encode(["", "abc"])[1].rows[1:])
    assert (full[:-3] == PAD).all()
    assert torch.equal(read_context(store, "", CODEC).expanded()[0], PAD.expand(LENGTH, WIDTH))


def test_a_context_as_long_as_the_window_has_no_padding() -> None:
    rows = torch.randn(LENGTH, WIDTH)
    assert torch.equal(left_padded(rows, torch.zeros(WIDTH), LENGTH).expanded()[0], rows)


def test_batches_are_sorted_by_length_then_text_and_each_prompt_is_encoded_once(store: Store) -> None:
    encoder = BatchEncoder()
    report = fill(["ccc", "a", "bb", "a", "aa", "ccc", ""], store, encoder)
    assert encoder.batches == [["", "a"], ["aa", "bb"], ["ccc"]]
    assert (report.encoded, report.existing) == (5, 0)


def test_what_is_missing_is_made_again_with_its_batch_and_is_the_same_bytes(store: Store) -> None:
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    fill(prompts, store, BatchEncoder())
    whole = files(store)
    store.storage.local_path(store.name(context_key("bb", CODEC))).unlink()
    store.storage.local_path(store.name(context_key("eeeee", CODEC))).write_bytes(b"damaged")
    encoder = BatchEncoder()
    report = fill(prompts[::-1], store, encoder, write_batch_size=64)
    assert encoder.batches == [["a", "bb"], ["eeeee"]]
    assert (report.encoded, report.existing, report.damaged) == (3, 3, 1)
    assert files(store) == whole


def test_an_interruption_leaves_no_trace(store: Store, tmp_path: Path) -> None:
    class Interrupted(BatchEncoder):
        def encode(self, prompts: Sequence[str]) -> list[TextContext]:
            if len(self.batches) == 3:
                raise KeyboardInterrupt
            return super().encode(prompts)

    prompts = [letter * (1 + number) for number, letter in enumerate("abcdefgh")]
    with pytest.raises(KeyboardInterrupt):
        fill(prompts, store, Interrupted(), write_batch_size=3)
    assert len(files(store)) == 4, "flushed at four, the first multiple of a batch that is three or more"
    fill(prompts, store, BatchEncoder())
    other = Store(LocalStorage(tmp_path / "other"))
    fill(prompts, other, BatchEncoder())
    assert files(store) == files(other)


def test_a_full_cache_needs_no_encoder(store: Store) -> None:
    fill(["a", "b"], store, BatchEncoder())

    def no_encoder() -> ContextEncoder:
        raise AssertionError("loaded")

    report = fill_contexts(
        ["b"], store, CODEC, no_encoder, batch_size=2, write_batch_size=2, report=lambda *_: None, world=ALONE
    )
    assert report == FillReport(0, 1, 0, report.seconds)


def test_a_context_that_is_not_finite_is_named(store: Store) -> None:
    class Broken(BatchEncoder):
        def encode(self, prompts: Sequence[str]) -> list[TextContext]:
            return [left_padded(torch.full((1, WIDTH), torch.inf), PAD, LENGTH) for _ in prompts]

    with pytest.raises(DataError, match="not finite for 'a'"):
        fill(["a"], store, Broken())


def test_another_encoder_is_another_key(store: Store) -> None:
    fill(["a"], store, BatchEncoder())
    with pytest.raises(DataError, match="is missing"):
        read_context(store, "a", LeftPaddedCodec("text in fp32"))
    assert context_key("a", CODEC) != context_key("a ", CODEC)


def test_progress_counts_what_is_encoded(store: Store) -> None:
    told: list[tuple[int, int]] = []
    fill_contexts(
        ["a", "b", "c"],
        store,
        CODEC,
        BatchEncoder,
        batch_size=2,
        write_batch_size=8,
        report=lambda done, total: told.append((done, total)),
        world=ALONE,
    )
    assert told == [(0, 3), (2, 3), (3, 3)]


def test_what_is_finished_is_written_before_more_work_begins(store: Store) -> None:
    """As of an encoder that takes the prompts in portions, and is interrupted in the second."""

    class InPortions(BatchEncoder):
        def encode_batches(
            self, batches: Sequence[Sequence[str]], report: Callable[[float], None]
        ) -> Iterator[list[TextContext]]:
            report(0.25)
            yield self.encode(batches[0])
            report(0.99)
            raise KeyboardInterrupt

    told: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        fill_contexts(
            ["a", "b", "c", "d"],
            store,
            CODEC,
            InPortions,
            batch_size=2,
            write_batch_size=100,
            report=lambda done, total: told.append((done, total)),
            world=ALONE,
        )
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert len(files(store)) == 2


@pytest.mark.slow
def test_a_thousand_captions_of_dev_take_less_than_a_third_of_the_plain_tensors_and_come_back_exactly(
    store: Store,
) -> None:
    """20 to 120 tokens with a template of 45. Narrower than dev's 15,360, so that what a file has besides its rows
    weighs more than there."""
    width, length, template, count = 480, 512, 45, 1000
    draws = torch.Generator().manual_seed(0)
    texts = torch.randint(20, 121, (count,), generator=draws)

    def plain(number: int) -> TextContext:
        rows = torch.randn(template + int(texts[number]), width, generator=torch.Generator().manual_seed(number))
        return left_padded(rows.bfloat16(), torch.linspace(-1, 1, width).bfloat16(), length)

    class Prompts:
        def lengths(self, prompts: Sequence[str]) -> list[int]:
            return [template + int(texts[int(prompt)]) for prompt in prompts]

        def encode_batches(
            self, batches: Sequence[Sequence[str]], _report: Callable[[float], None]
        ) -> Iterator[list[TextContext]]:
            return ([plain(int(prompt)) for prompt in batch] for batch in batches)

    prompts = [f"{number:04d}" for number in range(count)]
    fill(prompts, store, Prompts(), batch_size=8, write_batch_size=128)
    taken = sum(path.stat().st_size for path in store.storage.folder.rglob("*.safetensors"))
    assert taken < count * length * width * 2 / 3
    assert taken < 0.24 * count * length * width * 2, "what the mean of 116 rows of 512 comes to"
    for number in range(0, count, 97):
        found = read_context(store, prompts[number], CODEC).expanded()
        assert torch.equal(found.view(torch.int16), plain(number).expanded().view(torch.int16))


def test_a_file_of_dev_is_its_rows_one_row_of_padding_and_less_than_a_kilobyte(store: Store) -> None:
    store.write("00", {"rows": torch.zeros(105, 15360).bfloat16(), "pad": torch.zeros(15360).bfloat16()}, {})
    assert 0 < store.storage.local_path(store.name("00")).stat().st_size - 106 * 15360 * 2 < 1000


def test_contexts_for_which_the_disk_has_no_room_are_refused_before_the_encoder_loads(store: Store) -> None:
    folder = store.storage.local_path()
    assert folder is not None
    codec = RightPaddedCodec("text", min_bytes=free_disk_bytes(folder) // 2)
    states = {"batch_size": 2, "write_batch_size": 3, "report": lambda *_: None, "world": ALONE}

    def load() -> ContextEncoder:
        raise AssertionError("loaded")

    with pytest.raises(
        DiskError, match=r"The contexts of 3 captions take .* are free for .* set the dataset's cache_d"
    ):
        fill_contexts(["a", "b", "c"], store, codec, load, **states)  # type: ignore[arg-type]


def test_every_row_of_a_context_that_is_padded_on_the_right_is_kept(store: Store) -> None:
    context = TextContext.dense(torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)))
    codec = RightPaddedCodec("text")
    store.write("k" * 64, codec.pack(context), {})
    assert torch.equal(codec.unpack(store.read("k" * 64)).expanded(), context.expanded())


PROMPTS = [letter * (1 + number) for number, letter in enumerate("abcdefghijk")]


class CountedStorage(LocalStorage):
    """Notes which files are written."""

    written: ClassVar[list[str]] = []

    def write(self, name: str, data: bytes, *, sync: bool = True) -> None:
        self.written.append(name)
        super().write(name, data, sync=sync)


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store whose `storage.written` names every file written to it."""
    monkeypatch.setattr(CountedStorage, "written", [])
    return Store(CountedStorage(tmp_path / "counted"))


def fill_shared(
    store: Store, ranks: int, encoder: Callable[[World], ContextEncoder], told: list[tuple[int, int]] | None = None
) -> list[FillReport]:
    def fill_share(world: World) -> FillReport:
        own = encoder(world)
        report = (lambda *step: told.append(step)) if told is not None and world.is_main else lambda *_: None
        sizes = {"batch_size": 2, "write_batch_size": 3}
        return fill_contexts(PROMPTS, store, CODEC, lambda: own, **sizes, report=report, world=world)

    return on_ranks(ranks, fill_share)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_out_the_batches_of_one_process(store: Store, counted: Store, ranks: int) -> None:
    alone = BatchEncoder()
    fill(PROMPTS, store, alone)
    assert not torch.distributed.is_initialized()
    encoders = [BatchEncoder() for _ in range(ranks)]
    told: list[tuple[int, int]] = []
    reports = fill_shared(counted, ranks, lambda world: encoders[world.rank], told)
    assert files(counted) == files(store)
    names = [name for name in counted.storage.written if name.endswith(".safetensors")]
    assert len(names) == len(set(names)) == len(PROMPTS), "no file is written twice"
    assert [each.batches for each in encoders] == [alone.batches[rank::ranks] for rank in range(ranks)]
    assert {(r.encoded, r.existing, r.damaged) for r in reports} == {(len(PROMPTS), 0, 0)}, "of all, on each"
    assert told == sorted(told)
    assert told[0] == (0, len(PROMPTS))
    assert told[-1] == (len(PROMPTS), len(PROMPTS))


def test_a_rank_without_a_share_loads_no_encoder(store: Store) -> None:
    loaded: list[int] = []

    def fill_share(world: World) -> FillReport:
        def load() -> ContextEncoder:
            loaded.append(world.rank)
            return BatchEncoder()

        sizes = {"batch_size": 8, "write_batch_size": 3}
        return fill_contexts(PROMPTS, store, CODEC, load, **sizes, report=lambda *_: None, world=world)

    on_ranks(4, fill_share)
    assert set(loaded) == {0, 1}, "there are two batches"
    loaded.clear()
    assert {report.existing for report in on_ranks(4, fill_share)} == {len(PROMPTS)}
    assert not loaded


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_a_rank_that_fails_leaves_is_finished_by_any_number_of_ranks(
    store: Store, tmp_path: Path, ranks: int
) -> None:
    class Failing(BatchEncoder):
        def encode(self, prompts: Sequence[str]) -> list[TextContext]:
            if len(self.batches) == 2:
                raise DiskError.of("no space")
            return super().encode(prompts)

    with pytest.raises(DiskError, match="no space"):
        fill_shared(store, 2, lambda world: Failing() if world.rank == 1 else BatchEncoder())
    left = len(files(store))
    assert 0 < left < len(PROMPTS)
    reports = fill_shared(store, ranks, lambda _: BatchEncoder())
    assert {report.existing for report in reports} == {left}
    other = Store(LocalStorage(tmp_path / "other"))
    fill(PROMPTS, other, BatchEncoder())
    assert files(store) == files(other)


def test_a_damaged_file_is_found_by_rank_0_and_made_again_by_whoever_has_its_batch(
    store: Store, counted: Store
) -> None:
    fill(PROMPTS, store, BatchEncoder())
    fill(PROMPTS, counted, BatchEncoder())
    counted.storage.written.clear()
    for prompt in ("a", "ccc"):  # of the first and the second batch
        counted.storage.local_path(counted.name(context_key(prompt, CODEC))).write_bytes(b"damaged")
    encoders = [BatchEncoder() for _ in range(2)]
    reports = fill_shared(counted, 2, lambda world: encoders[world.rank])
    assert {(r.encoded, r.existing, r.damaged) for r in reports} == {(4, len(PROMPTS) - 2, 2)}
    assert [each.batches for each in encoders] == [[["a", "bb"]], [["ccc", "dddd"]]]
    assert files(counted) == files(store)


def test_rank_0_checks_the_room_for_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = LeftPaddedCodec("text", min_bytes=10)
    monkeypatch.setattr(store_module, "free_disk_bytes", lambda _: 10 * len(PROMPTS) - 1)

    def fill_share(world: World) -> FillReport:
        sizes = {"batch_size": 2, "write_batch_size": 3}
        return fill_contexts(PROMPTS, store, codec, BatchEncoder, **sizes, report=lambda *_: None, world=world)

    with pytest.raises(DiskError, match="The contexts of 11 captions take 110 B"):
        on_ranks(2, fill_share)
    assert not files(store)
