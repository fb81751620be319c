"""Which prompts a picture has, by strategy."""

from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path

import pytest

from simpletuner.base.errors import DataError
from simpletuner.base.storage import LocalStorage
from simpletuner.base.text import CAPTION_BYTES
from simpletuner.config.datasets import ImageSet
from simpletuner.data.captions import caption_text, captions_of, without_texts
from simpletuner.data.rejected import Rejected

MakeSet = Callable[..., ImageSet]
NO_FILES = LocalStorage(Path("nowhere"))


@pytest.fixture
def of_text(folder: Path, make_set: MakeSet) -> Callable[..., tuple[str, ...]]:
    """The captions of a.png beside an a.txt that holds these bytes."""

    def captions(data: bytes, *, seed: int = 0, caption_filter: Sequence[str] = (), **keys: object) -> tuple[str, ...]:
        (folder / "a.txt").write_bytes(data)
        own = make_set(caption_strategy="textfile", **keys)
        storage, files = LocalStorage(folder), {"a": "a.txt"}
        return captions_of("a.png", own, storage, files, seed=seed, caption_filter=caption_filter)

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
    with pytest.raises(Rejected, match=r"a\.txt contains no visible text") as empty:
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


@pytest.mark.parametrize(
    ("caption", "texts", "left"),
    [
        ("a cat, red", ["dog"], "a cat, red"),
        ("a cat , , red..", ["dog"], "a cat , , red.."),  # untouched where nothing is found
        ("a cat, low quality, red", ["low quality"], "a cat, red"),
        ("low quality, a cat, watermark", ["low quality", "watermark"], "a cat"),
        ("a cat, low quality.", ["low quality"], "a cat."),
        ("A cat. Low quality. Red.", ["Low quality"], "A cat. Red."),
        ("a cat... watermark, red", ["watermark"], "a cat... red"),
        ("arafed woman in red", ["arafed "], "woman in red"),
        ("a very very red cat", ["very"], "a red cat"),
        ("红猫在屋顶", ["猫"], "红在屋顶"),
        ("a cat\nwatermark\nred", ["watermark"], "a cat\n\nred"),
    ],
)
def test_texts_are_taken_out_with_their_separators(caption: str, texts: list[str], left: str) -> None:
    assert without_texts(caption, texts) == left


def test_a_caption_of_which_nothing_is_left_is_rejected(of_text: Callable[..., tuple[str, ...]]) -> None:
    assert of_text(b"a cat, photo\nphoto\n", caption_filter=["photo"]) == ("a cat",)
    with pytest.raises(Rejected, match="its caption was 'photo,'") as caught:
        of_text(b"photo,\n", caption_filter=["photo"])
    assert caught.value.reason == "nothing left by caption_filter_list"
    assert of_text(b"photo,\n", caption_filter=["photo"], instance_prompt="a photo") == ("a photo",)


def test_without_parts_to_shuffle_the_caption_stays(of_text: Callable[..., tuple[str, ...]]) -> None:
    assert of_text(b"a, b, c", caption_shuffle={"enable": False, "count": 5}) == ("a, b, c",)
    assert of_text(b"a cat", caption_shuffle={"enable": True, "count": 5}) == ("a cat",)


def test_shuffled_variants_are_drawn_by_seed_and_keep_the_first_parts(
    of_text: Callable[..., tuple[str, ...]],
) -> None:
    how = {"enable": True, "count": 40, "position_start": 1}
    keys = {"caption_shuffle": how, "prepend_instance_prompt": True, "instance_prompt": "sks"}
    text = b"cat, red ,big,on a roof\na dog, old, wet\n"
    found = of_text(text, **keys)
    assert len(found) == 80
    expected = {f"sks cat, {', '.join(each)}" for each in permutations(("red", "big", "on a roof"))}
    assert set(found[:40]) == expected
    assert set(found[40:]) == {"sks a dog, old, wet", "sks a dog, wet, old"}
    assert of_text(text, **keys) == found != of_text(text, **keys, seed=2)
    own = {"caption_shuffle": how | {"seed": 7}, "prepend_instance_prompt": True, "instance_prompt": "sks"}
    assert of_text(text, **own) == of_text(text, **own, seed=2) != found


def test_other_separators_and_the_original(of_text: Callable[..., tuple[str, ...]]) -> None:
    how = {"enable": True, "count": 20, "split_on": "space", "include_original": True}
    found = of_text(b"red  big", caption_shuffle=how)
    assert found[0] == "red  big"
    assert set(found[1:]) == {"red big", "big red"}
    assert of_text(b"x. y. z.", caption_shuffle={"enable": True, "split_on": "period"})[0].count(". ") == 2
    assert of_text(b"b, a", caption_shuffle={"enable": True, "count": 9}, dataset_type="eval") == ("b, a",)
