"""Which prompts a picture has, by strategy."""

from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.base.errors import DataError
from simpletuner.base.storage import LocalStorage
from simpletuner.base.text import CAPTION_BYTES
from simpletuner.config.datasets import ImageSet
from simpletuner.data.captions import caption_text, captions_of
from simpletuner.data.rejected import Rejected

MakeSet = Callable[..., ImageSet]
NO_FILES = LocalStorage(Path("nowhere"))


@pytest.fixture
def of_text(folder: Path, make_set: MakeSet) -> Callable[..., tuple[str, ...]]:
    """The captions of a.png beside an a.txt that holds these bytes."""

    def captions(data: bytes, **keys: object) -> tuple[str, ...]:
        (folder / "a.txt").write_bytes(data)
        return captions_of("a.png", make_set(caption_strategy="textfile", **keys), LocalStorage(folder), {"a": "a.txt"})

    return captions


def test_each_line_of_a_text_file_is_a_caption(of_text: Callable[..., tuple[str, ...]]) -> None:
    text = b" a red barn \r\n\r\n\tthe same barn\rat night\n"
    assert of_text(text) == ("a red barn", "the same barn", "at night")
    assert of_text(text, disable_multiline_split=True) == ("a red barn \n\n\tthe same barn\nat night",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_say_what_they_are(of_text: Callable[..., tuple[str, ...]], encoding: str) -> None:
    assert of_text("une fête — 祭り".encode(encoding)) == ("une fête — 祭り",)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"caf\xe9 noir", "byte 0xe9 at position 3"),
        (b"\xef\xbb\xbfcaf\xe9", "byte 0xe9 at position 6"),
        ("fête".encode("utf-16")[:-1], "position 8"),
    ],
)
def test_other_encodings_are_refused_with_the_place(data: bytes, found: str) -> None:
    with pytest.raises(Rejected, match=found) as caught:
        caption_text(data, "a.txt")
    assert caught.value.reason == "caption is not UTF-8"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_text_that_does_not_say_so_is_not_taken_for_a_caption(encoding: str) -> None:
    with pytest.raises(Rejected, match=r"NUL|UTF-32") as caught:
        caption_text("a red barn".encode(encoding), "a.txt")
    assert caught.value.reason == "caption is not UTF-8"
    with pytest.raises(Rejected, match="NUL"):
        caption_text(bytes(20), "a.txt")


@pytest.mark.parametrize("blank", ["\u200b", "\ufeff", "\u2060 \n\u00ad", "\x01\x02", "\u0301", "\u3164", "\u2800"])
def test_what_is_drawn_as_nothing_is_no_caption(of_text: Callable[..., tuple[str, ...]], blank: str) -> None:
    with pytest.raises(Rejected, match="no visible text") as caught:
        of_text(blank.encode())
    assert caught.value.reason == "empty caption"
    assert of_text(f"{blank}\na barn\n{blank}".encode()) == ("a barn",), "nor is such a line"
    assert of_text(blank.encode(), instance_prompt="a zorblat") == ("a zorblat",)


def test_every_script_is_visible(of_text: Callable[..., tuple[str, ...]]) -> None:
    captions = ("चित्र", "ภาพ", "e\u0301", "🏚\ufe0f", "祭り", "!")
    assert of_text("\n".join(captions).encode()) == captions


def test_a_caption_that_is_too_long_is_rejected_unread(of_text: Callable[..., tuple[str, ...]]) -> None:
    fits = b"a" * CAPTION_BYTES
    assert of_text(fits, disable_multiline_split=True) == of_text(fits) == (fits.decode(),)
    assert len(of_text(b"a line\n" * 20_000)) == 20_000, "many short ones are fine"
    for data, keys in (
        (fits + b"a", {}),
        (fits + b"a", {"disable_multiline_split": True}),
        (b"a line\n" * 200_000, {}),
    ):
        with pytest.raises(Rejected, match="KiB") as caught:
            of_text(data, **keys)
        assert caught.value.reason == "caption is too long"


def test_a_caption_file_that_went_away_costs_its_picture(make_set: MakeSet, folder: Path) -> None:
    with pytest.raises(Rejected, match=r"a\.txt: No such file") as caught:
        captions_of("a.png", make_set(caption_strategy="textfile"), LocalStorage(folder), {"a": "a.txt"})
    assert caught.value.reason == "caption cannot be read"


def test_a_file_name_without_a_letter_is_no_caption(make_set: MakeSet) -> None:
    with pytest.raises(Rejected, match="no visible text"):
        captions_of("___.jpg", make_set(caption_strategy="filename"), NO_FILES, {})


def test_a_missing_or_empty_caption_is_rejected_unless_there_is_an_instance_prompt(
    of_text: Callable[..., tuple[str, ...]], make_set: MakeSet
) -> None:
    with pytest.raises(Rejected, match=r"expected a\.txt or a\.caption beside it") as missing:
        captions_of("sub/a.png", make_set(caption_strategy="textfile"), NO_FILES, {})
    with pytest.raises(Rejected, match=r"a\.txt holds no visible text") as empty:
        of_text(b"\xef\xbb\xbf \n\n")
    assert (missing.value.reason, empty.value.reason) == ("no caption", "empty caption")
    assert of_text(b"", instance_prompt="a zorblat") == ("a zorblat",)
    assert captions_of("a.png", make_set(caption_strategy="textfile", instance_prompt="x"), NO_FILES, {}) == ("x",)
    with pytest.raises(Rejected, match="0xff"):
        of_text(b"\xff", instance_prompt="a zorblat")


def test_the_file_name_is_a_caption(make_set: MakeSet) -> None:
    assert captions_of("sub/a_red-barn_2.0.jpg", make_set(caption_strategy="filename"), NO_FILES, {}) == (
        "a red-barn 2.0",
    )


def test_the_instance_prompt(of_text: Callable[..., tuple[str, ...]], make_set: MakeSet) -> None:
    keys = {"instance_prompt": "a zorblat"}
    assert captions_of("a.png", make_set(caption_strategy="instanceprompt", **keys), NO_FILES, {}) == ("a zorblat",)
    assert of_text(b"one\ntwo", only_instance_prompt=True, **keys) == ("a zorblat",)
    assert of_text(b"one\ntwo", prepend_instance_prompt=True, **keys) == ("a zorblat one", "a zorblat two")
    with pytest.raises(DataError, match="no instance_prompt"):
        captions_of("a.png", make_set(caption_strategy="instanceprompt"), NO_FILES, {})
