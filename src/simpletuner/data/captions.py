"""The prompts of an image, by its dataset's `caption_strategy`."""

import codecs
import random
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from simpletuner.base.draws import draw_seed
from simpletuner.base.errors import DataError
from simpletuner.base.imagefiles import CAPTION_SUFFIXES, caption_key
from simpletuner.base.storage import Storage
from simpletuner.base.text import CAPTION_BYTES, is_visible, size_in_bytes
from simpletuner.config.datasets import CaptionShuffle, ImageSet
from simpletuner.data.rejected import Rejected

LINE_END = re.compile(r"\r\n|\r|\n")

NO_CAPTION, EMPTY_CAPTION, LONG_CAPTION, NOT_TEXT = (
    "no caption", "empty caption", "caption is too long", "caption is not UTF-8"
)  # fmt: skip

FILTERED_CAPTION = "nothing left by caption_filter_list"

LACKS_CAPTION = frozenset({NO_CAPTION, EMPTY_CAPTION})
"""Rejection reasons that an `instance_prompt` would remedy."""

LINES_BYTES = 1024 * 1024
"""Size limit of a file with one caption per line: ten thousand captions of a hundred characters."""

UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


SEPARATORS = re.compile(r"[ \t]*[,;.](?:[ \t]*[,;]|[ \t]+\.)+")
"""Runs of separators around a removed text; an ellipsis does not match."""


def captions_of(
    name: str,
    image_set: ImageSet,
    images: Storage,
    text_files: dict[str, str],
    *,
    seed: int = 0,
    caption_filter: Sequence[str] = (),
) -> tuple[str, ...]:
    """All candidate prompts of the image `name`, exactly as they will be encoded. One is drawn each time the image is
    used. `text_files` are the caption files in `images`, by `caption_key`.

    `textfile`: the lines of the .txt file beside the image (`a.jpg` and `a.png` share `a.txt`), else of the .caption
    file; with `disable_multiline_split` the whole text. `filename`: the name without suffix, underscores read as
    spaces. `instanceprompt`: `instance_prompt`. The texts of `caption_filter` are removed from each candidate, then
    `caption_shuffle` makes several variants of it, drawn from `seed`. `prepend_instance_prompt` puts that prompt and a
    space before each; `only_instance_prompt` replaces them. If a caption is missing or empty (no visible character),
    `instance_prompt` is used if the dataset has one.

    Raises:
        Rejected: the caption is missing, empty, empty after the filter, longer than `CAPTION_BYTES`, or not text.
        DataError: the dataset needs an `instance_prompt` and has none.
    """
    prompt = image_set.instance_prompt
    if image_set.only_instance_prompt or image_set.caption_strategy == "instanceprompt":
        return (_required_prompt(image_set),)
    try:
        if image_set.caption_strategy == "filename":
            candidates = _visible([PurePosixPath(name).stem.replace("_", " ").strip()], "its name")
        else:
            candidates = _from_file(name, image_set, images, text_files)
        candidates = _filtered(candidates, caption_filter)
    except Rejected as rejected:
        if prompt is None or rejected.reason not in LACKS_CAPTION | {FILTERED_CAPTION}:
            raise
        return (prompt,)
    shuffle = image_set.caption_shuffle
    if shuffle is not None and shuffle.enable and image_set.dataset_type == "image":
        candidates = tuple(variant for each in candidates for variant in shuffled_caption(each, shuffle, seed))
    if image_set.prepend_instance_prompt:
        return tuple(f"{_required_prompt(image_set)} {candidate}" for candidate in candidates)
    return candidates


def shuffled_caption(caption: str, shuffle: CaptionShuffle, seed: int) -> list[str]:
    """The shuffled variants of `caption`, possibly with duplicates. If fewer than two parts can be shuffled, only the
    caption itself."""
    parts = [part.strip() for part in caption.split(shuffle.split_on) if part.strip()]
    fixed, movable = parts[: shuffle.position_start], parts[shuffle.position_start :]
    if len(movable) < 2:
        return [caption]
    between = shuffle.split_on if shuffle.split_on[-1].isspace() else f"{shuffle.split_on} "
    variants = [caption] if shuffle.include_original else []
    for number in range(shuffle.count):
        draw = random.Random(
            draw_seed(seed if shuffle.seed is None else shuffle.seed, "caption_shuffle", caption, number)
        )
        # `sorted` calls the key once per part, in order; Python guarantees the sequence of `random()` across versions.
        variants.append(between.join([*fixed, *sorted(movable, key=lambda _: draw.random())]))
    return variants


def without_texts(caption: str, texts: Sequence[str]) -> str:
    """Remove `texts` from `caption`, also inside words, with the separators and spaces around them. A caption without
    any of them is returned unchanged.
    """
    cleaned = caption
    for text in texts:
        cleaned = cleaned.replace(text, "")
    if cleaned == caption:
        return caption
    cleaned = SEPARATORS.sub(lambda run: "." if "." in run.group() else run.group().lstrip()[0], cleaned)
    cleaned = re.sub(r"[ \t]+(?=[,;.])", "", cleaned)
    return re.sub(r"[ \t]{2,}", " ", cleaned).strip(" \t\r\n,;").removeprefix(".").lstrip()


def _filtered(candidates: tuple[str, ...], texts: Sequence[str]) -> tuple[str, ...]:
    captions = tuple(filter(is_visible, (without_texts(candidate, texts) for candidate in candidates)))
    if not captions:
        raise Rejected(FILTERED_CAPTION, f"its caption was {candidates[0]!r}")
    return captions


def _required_prompt(image_set: ImageSet) -> str:
    if image_set.instance_prompt is None:
        raise DataError.of(
            f"{image_set.id}: no instance_prompt",
            "one, for caption_strategy instanceprompt, only_instance_prompt and prepend_instance_prompt",
        )
    return image_set.instance_prompt


def _from_file(name: str, image_set: ImageSet, images: Storage, text_files: dict[str, str]) -> tuple[str, ...]:
    text_file = text_files.get(caption_key(name))
    if text_file is None:
        expected_names = " or ".join(PurePosixPath(name).with_suffix(suffix).name for suffix in CAPTION_SUFFIXES)
        raise Rejected(NO_CAPTION, f"expected {expected_names} beside it, for caption_strategy textfile")
    max_bytes = CAPTION_BYTES if image_set.disable_multiline_split else LINES_BYTES
    try:
        data = images.read(text_file, 0, max_bytes + 1)
    except OSError as error:
        raise Rejected("caption cannot be read", f"{text_file}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise Rejected(LONG_CAPTION, f"{text_file} is larger than {max_bytes // 1024} KiB")
    text = caption_text(data, text_file)
    if image_set.disable_multiline_split:
        return _visible([LINE_END.sub("\n", text).strip()], text_file)
    return _visible([line.strip() for line in LINE_END.split(text)], text_file)


def _visible(candidates: list[str], source: str) -> tuple[str, ...]:
    """The `candidates` with visible text."""
    captions = tuple(filter(is_visible, candidates))
    if not captions:
        raise Rejected(EMPTY_CAPTION, f"{source} contains no visible text")
    longest = max(map(size_in_bytes, captions))
    if longest > CAPTION_BYTES:
        limit = f"the limit is {CAPTION_BYTES // 1024} KiB"
        raise Rejected(LONG_CAPTION, f"{source}: a caption of {longest // 1024} KiB; {limit}")
    return captions


def caption_text(data: bytes, name: str) -> str:
    """Decode a caption file: UTF-8 with or without a byte-order mark, or UTF-16 with one (Windows' "Unicode").

    Other encodings are rejected rather than guessed: a wrong guess would silently train on garbled prompts.

    Raises:
        Rejected: the bytes are not such text; the message has the byte and its position.
    """
    if data.startswith(UTF32_MARKS):
        raise Rejected(NOT_TEXT, f"{name}: UTF-32; save it as UTF-8")
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        position = error.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
        invalid_byte = f"byte 0x{data[position]:02x} at position {position}"
        raise Rejected(NOT_TEXT, f"{name}: {invalid_byte}; save it as UTF-8") from error
    if "\0" in text:
        raise Rejected(NOT_TEXT, f"{name}: a NUL, as in UTF-16 or UTF-32 without a byte-order mark; save it as UTF-8")
    return text
