"""Whose tensors lie under a cache's key."""

from pathlib import Path

import pytest

from simpletuner.base.storage import LocalStorage
from simpletuner.data.storages import LEDGER
from simpletuner.train.claims import CLAIMS, claim, key_of_latents


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


EARLIER, OTHER_DECODER = (("earlier", "earlier whole"), ("other decoder", "other decoder whole"))


def test_new_latents_have_their_own_key_and_keep_it(stores: list[LocalStorage]) -> None:
    for earlier in (EARLIER, OTHER_DECODER):
        assert key_of_latents(stores, "new", *earlier) == "new"
        for store in stores:
            store.write(LEDGER, b"{}")
    assert key_of_latents(stores, "other encoder", *EARLIER) == "other encoder"


@pytest.mark.parametrize("noted", [True, False], ids=["with a note", "older than notes"])
def test_what_an_earlier_release_cached_is_used_on_and_another_decoder_finds_it(
    stores: list[LocalStorage], noted: bool
) -> None:
    stores[0].write(LEDGER, b"{}")
    if noted:
        assert claim(stores[:1], *EARLIER)
    for earlier in (EARLIER, EARLIER, OTHER_DECODER):
        assert key_of_latents(stores, "new", *earlier) == "earlier"
    assert key_of_latents(stores[1:], "new", *OTHER_DECODER) == "earlier", "noted in all"
    assert key_of_latents(stores, "other encoder", *OTHER_DECODER) == "other encoder"


def test_of_two_vaes_of_an_earlier_release_each_finds_its_own(stores: list[LocalStorage]) -> None:
    assert claim(stores, "earlier", "of another")
    assert key_of_latents(stores, "new", *EARLIER) == "earlier whole"


def test_a_damaged_note_is_left_as_it_is(stores: list[LocalStorage]) -> None:
    stores[0].write(CLAIMS, b"{")
    assert key_of_latents(stores[:1], "new", *EARLIER) == "new"
    assert stores[0].read(CLAIMS) == b"{"
