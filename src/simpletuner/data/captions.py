"""The prompts of a picture, by the set's `caption_strategy`."""

import codecs
import re
from pathlib import PurePosixPath

from simpletuner.base.errors import DataError
from simpletuner.base.storage import Storage
from simpletuner.config.datasets import ImageSet
from simpletuner.data.discover import CAPTION_SUFFIX, caption_key
from simpletuner.data.rejected import Rejected

LINE_END = re.compile(r"\r\n|\r|\n")

NO_CAPTION, EMPTY_CAPTION = "no caption", "empty caption"


def captions_of(name: str, image_set: ImageSet, images: Storage, text_files: dict[str, str]) -> tuple[str, ...]:
    """All candidate prompts of the picture `name`, exactly as they will be encoded; one is drawn at each
    visit. `text_files` are the caption files in `images`, by `caption_key`.

    `textfile`: the lines of the .txt beside the picture (`a.jpg` and `a.png` share `a.txt`), or the whole
    text with `disable_multiline_split`. `filename`: the name without suffix, underscores read as spaces.
    `instanceprompt`: `instance_prompt`. `prepend_instance_prompt` puts that and a space before each
    candidate; `only_instance_prompt` replaces them. A caption that is missing or empty is `instance_prompt`
    where the set has one.

    Raises:
        Rejected: no caption, an empty one, or one that is not text.
        DataError: the set needs an `instance_prompt` and has none.
    """
    prompt = image_set.instance_prompt
    if image_set.only_instance_prompt or image_set.caption_strategy == "instanceprompt":
        return (_required_prompt(image_set),)
    if image_set.caption_strategy == "filename":
        candidates: tuple[str, ...] = (PurePosixPath(name).stem.replace("_", " ").strip(),)
    else:
        try:
            candidates = _from_file(name, image_set, images, text_files)
        except Rejected as rejected:
            if prompt is None or rejected.reason not in (NO_CAPTION, EMPTY_CAPTION):
                raise
            return (prompt,)
    if image_set.prepend_instance_prompt:
        return tuple(f"{_required_prompt(image_set)} {candidate}" for candidate in candidates)
    return candidates


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
        wanted = PurePosixPath(name).with_suffix(CAPTION_SUFFIX).name
        raise Rejected(NO_CAPTION, f"expected {wanted} beside it, for caption_strategy textfile")
    text = caption_text(images.read(text_file), text_file)
    if image_set.disable_multiline_split:
        candidates = [LINE_END.sub("\n", text).strip()]
    else:
        candidates = [line.strip() for line in LINE_END.split(text)]
    captions = tuple(filter(None, candidates))
    if not captions:
        raise Rejected(EMPTY_CAPTION, f"{text_file} holds no text")
    return captions


def caption_text(data: bytes, name: str) -> str:
    """The text of a caption file: UTF-8 with or without a byte-order mark, or UTF-16 with one (Windows'
    "Unicode").

    Anything else is refused rather than guessed: a wrong guess trains on garbled prompts without a word.

    Raises:
        Rejected: not such text, with the byte and its position.
    """
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        position = error.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
        found = f"byte 0x{data[position]:02x} at position {position}"
        raise Rejected("caption is not UTF-8", f"{name}: {found}; save it as UTF-8") from error
