"""Whose tensors lie under a cache's key."""

from pathlib import Path

import pytest

from simpletuner.base.storage import LocalStorage
from simpletuner.train.claims import CLAIMS, claim


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
