"""Text files that people edit too."""

import asyncio
import os
from pathlib import Path

import pytest

from simpletuner.server.documents import LARGEST_DOCUMENT, read_text, write_text
from simpletuner.server.faults import Fault


def test_a_text_has_a_revision_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert read_text(path) == (None, "")
    path.write_bytes(b"\xef\xbb\xbfone")
    with_mark, first = read_text(path)
    path.write_bytes(b"one")
    without_mark, second = read_text(path)
    assert with_mark == without_mark == "one"
    assert first != second


def test_what_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b" " * (LARGEST_DOCUMENT + 1))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name in ("large", "folder", "pipe", "latin"):
        with pytest.raises(Fault) as told:
            read_text(tmp_path / name)
        assert told.value.status == 422


def test_of_two_edits_at_once_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    _, revision = read_text(path)

    async def both() -> list[object]:
        lock = asyncio.Lock()
        edits = [write_text(path, text, revision, lock) for text in ("one", "other")]
        return await asyncio.gather(*edits, return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None
    assert isinstance(second, Fault)
    assert second.status == 409
    assert path.read_text() == "one"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    _, revision = read_text(tmp_path / "link")
    asyncio.run(write_text(tmp_path / "link", "after", revision, asyncio.Lock()))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"
