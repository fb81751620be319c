"""The prompts of a picture, by the set's `caption_strategy`."""

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
"""Reasons that `instance_prompt` would mend."""

LINES_BYTES = 1024 * 1024
"""Largest file of captions, one a line: ten thousand of a hundred characters."""

UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


SEPARATORS = re.compile(r"[ \t]*[,;.](?:[ \t]*[,;]|[ \t]+\.)+")
"""Those around a text that was taken out; an ellipsis is none."""


def captions_of(
    name: str,
    image_set: ImageSet,
    images: Storage,
    text_files: dict[str, str],
    *,
    seed: int = 0,
    caption_filter: Sequence[str] = (),
) -> tuple[str, ...]:
    """All candidate prompts of the picture `name`, exactly as they will be encoded; one is drawn at each
    visit. `text_files` are the caption files in `images`, by `caption_key`.

    `textfile`: the lines of the .txt, else the .caption, beside the picture (`a.jpg` and `a.png` share `a.txt`), or
    the whole text with `disable_multiline_split`. `filename`: the name without suffix, underscores read as spaces.
    `instanceprompt`: `instance_prompt`. The texts of `caption_filter` are taken out of each candidate, then
    `caption_shuffle` makes several of it, drawn from `seed`. `prepend_instance_prompt` puts that prompt and a space
    before each; `only_instance_prompt` replaces them. A caption that is missing or empty (no visible character) is
    `instance_prompt` where the set has one.

    Raises:
        Rejected: no caption, an empty one, one of which the filter leaves nothing, one of more than `CAPTION_BYTES`, or
            one that is not text.
        DataError: the set needs an `instance_prompt` and has none.
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
    how = image_set.caption_shuffle
    if how is not None and how.enable and image_set.dataset_type == "image":
        candidates = tuple(variant for each in candidates for variant in shuffled_caption(each, how, seed))
    if image_set.prepend_instance_prompt:
        return tuple(f"{_required_prompt(image_set)} {candidate}" for candidate in candidates)
    return candidates


def shuffled_caption(caption: str, how: CaptionShuffle, seed: int) -> list[str]:
    """The variants of `caption`, which may be alike. One with less than two parts to shuffle stays alone as it is."""
    parts = [part.strip() for part in caption.split(how.split_on) if part.strip()]
    fixed, loose = parts[: how.position_start], parts[how.position_start :]
    if len(loose) < 2:
        return [caption]
    between = how.split_on if how.split_on[-1].isspace() else f"{how.split_on} "
    variants = [caption] if how.include_original else []
    for number in range(how.count):
        draw = random.Random(draw_seed(seed if how.seed is None else how.seed, "caption_shuffle", caption, number))
        # `sorted` asks for one number a part, in turn; Python keeps that sequence between versions.
        variants.append(between.join([*fixed, *sorted(loose, key=lambda _: draw.random())]))
    return variants


def without_texts(caption: str, texts: Sequence[str]) -> str:
    """`caption` without any of `texts`, also where they stand inside a word, and without the separators and spaces that
    were around them. One that holds none of them stays as it is.
    """
    left = caption
    for text in texts:
        left = left.replace(text, "")
    if left == caption:
        return caption
    left = SEPARATORS.sub(lambda run: "." if "." in run.group() else run.group().lstrip()[0], left)
    left = re.sub(r"[ \t]+(?=[,;.])", "", left)
    return re.sub(r"[ \t]{2,}", " ", left).strip(" \t\r\n,;").removeprefix(".").lstrip()


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
        wanted = " or ".join(PurePosixPath(name).with_suffix(suffix).name for suffix in CAPTION_SUFFIXES)
        raise Rejected(NO_CAPTION, f"expected {wanted} beside it, for caption_strategy textfile")
    most = CAPTION_BYTES if image_set.disable_multiline_split else LINES_BYTES
    try:
        data = images.read(text_file, 0, most + 1)
    except OSError as error:
        raise Rejected("caption cannot be read", f"{text_file}: {error.strerror}") from error
    if len(data) > most:
        raise Rejected(LONG_CAPTION, f"{text_file} is larger than {most // 1024} KiB")
    text = caption_text(data, text_file)
    if image_set.disable_multiline_split:
        return _visible([LINE_END.sub("\n", text).strip()], text_file)
    return _visible([line.strip() for line in LINE_END.split(text)], text_file)


def _visible(candidates: list[str], source: str) -> tuple[str, ...]:
    """Those of `candidates` that say something."""
    captions = tuple(filter(is_visible, candidates))
    if not captions:
        raise Rejected(EMPTY_CAPTION, f"{source} holds no visible text")
    longest = max(map(size_in_bytes, captions))
    if longest > CAPTION_BYTES:
        limit = f"the limit is {CAPTION_BYTES // 1024} KiB"
        raise Rejected(LONG_CAPTION, f"{source}: a caption of {longest // 1024} KiB; {limit}")
    return captions


def caption_text(data: bytes, name: str) -> str:
    """The text of a caption file: UTF-8 with or without a byte-order mark, or UTF-16 with one (Windows'
    "Unicode").

    Anything else is refused rather than guessed: a wrong guess trains on garbled prompts without a word.

    Raises:
        Rejected: not such text, with the byte and its position.
    """
    if data.startswith(UTF32_MARKS):
        raise Rejected(NOT_TEXT, f"{name}: UTF-32; save it as UTF-8")
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        position = error.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
        found = f"byte 0x{data[position]:02x} at position {position}"
        raise Rejected(NOT_TEXT, f"{name}: {found}; save it as UTF-8") from error
    if "\0" in text:
        raise Rejected(NOT_TEXT, f"{name}: NUL, as UTF-16 or UTF-32 without a byte-order mark has; save it as UTF-8")
    return text
