"""Whose tensors lie under a cache's key."""

from pathlib import Path

import pytest

from simpletuner.base.storage import LocalStorage
from simpletuner.data.storages import LEDGER
from simpletuner.train.claims import CLAIMS, CacheKey, claim, claimed


@pytest.fixture
def stores(tmp_path: Path) -> list[LocalStorage]:
    return [LocalStorage(tmp_path / name) for name in ("one", "two")]


def test_the_first_content_has_the_key_and_another_does_not(stores: list[LocalStorage]) -> None:
    assert claim(stores, "key", "content")
    assert claim(stores, "key", "content")
    assert not claim(stores, "key", "other")
    assert claim(stores, "other key", "other")
    assert claim(stores, "key", "content"), "what was refused is not noted"


def test_one_cache_of_another_content_is_enough(stores: list[LocalStorage]) -> None:
    assert claim(stores[1:], "key", "content")
    assert not claim(stores, "key", "other")
    assert not (stores[0].folder / CLAIMS).exists()


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_damaged_note_leaves_the_key_to_nobody(stores: list[LocalStorage], text: str) -> None:
    assert claim(stores, "key", "content")
    (stores[0].folder / CLAIMS).write_text(text, encoding="latin-1")
    assert not claim(stores, "key", "content")


NEW, EARLIER, OTHER_DECODER = (
    CacheKey("new", "new whole"),
    CacheKey("earlier", "earlier whole"),
    CacheKey("o", "o whole"),
)


def test_a_new_cache_has_todays_key_and_weights_that_differ_further_on_have_another(stores: list[LocalStorage]) -> None:
    assert claimed(stores, NEW, EARLIER) == claimed(stores, NEW, OTHER_DECODER) == "new"
    assert claimed(stores, CacheKey("new", "others"), EARLIER) == "others"


@pytest.mark.parametrize("noted", [True, False], ids=["with a note", "older than notes"])
def test_what_an_earlier_release_cached_is_used_on_and_another_decoder_finds_it(
    stores: list[LocalStorage], noted: bool
) -> None:
    stores[0].write(LEDGER, b"{}")
    if noted:
        assert claim(stores, EARLIER.heads, EARLIER.whole)
    for earlier in (EARLIER, EARLIER, OTHER_DECODER):
        assert claimed(stores, NEW, earlier) == "earlier"
    assert claimed(stores, CacheKey("new", "others"), OTHER_DECODER) == "new", "of another encoder"


def test_of_two_encoders_of_an_earlier_release_each_finds_its_own(stores: list[LocalStorage]) -> None:
    assert claim(stores, EARLIER.heads, "of another")
    assert claimed(stores, NEW, EARLIER) == EARLIER.whole
