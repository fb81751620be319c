"""The tokenizer of a FLUX.2 without its text encoder: where it lies, and how many tokens a caption has."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.base.files import with_home
from simpletuner.base.tensorfile import is_weight_file
from simpletuner.config.flavours import FLAVOURS, TextContextSpec
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2 import tiny
from simpletuner.flux2.configs import check_tokenizer
from simpletuner.flux2.places import Hub, cached_snapshot
from simpletuner.flux2.single import single_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Mistral's own pre-tokenizer, as in its tekken.json: case counts and every digit is a token.
_TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BATCH = 1000
"""Captions that are counted at a time."""
MOST_COUNTED = 10_000
"""Captions that are counted, the longest in bytes first: a second on a core at 100 tokens each."""

ASCII_PER_TOKEN = 3
"""ASCII characters of a token, at least: English has about four and a half. Of others a character is a token or less,
but for rare ones.
"""
TEMPLATE_TOKENS = 64
"""Tokens of the text around a caption, at most."""


@dataclass(frozen=True)
class CaptionLength:
    """Tokens of the longest of some captions, template included."""

    tokens: int
    tokenizer: Path | None
    """The folder of the tokenizer that counted; None for an estimate by characters."""


def longest_caption(captions: Collection[str], options: ModelOptions) -> CaptionLength:
    """The longest of `captions`, counted where a tokenizer of the model is on this disk, else estimated.

    Raises:
        AccessError: the tokenizer's file is damaged.
    """
    folder = find_tokenizer(options)
    if folder is None:
        return CaptionLength(max(map(estimated_tokens, captions)), None)
    check_tokenizer(folder, ("tokenizer.json",))
    text = FLAVOURS[options.model_flavour].text
    tokenizer = load_tokenizer(folder, text, options.tokenizer_fix_regex)
    # A token is a byte or more, so the longest in bytes come first and most others need not be counted.
    ordered = sorted(captions, key=lambda caption: len(caption.encode()), reverse=True)[:MOST_COUNTED]
    most, around = 0, len(tokenizer.encode(rendered(text, ""), add_special_tokens=False))
    for start in range(0, len(ordered), BATCH):
        if around + len(ordered[start].encode()) <= most:
            break
        batch = [rendered(text, caption) for caption in ordered[start : start + BATCH]]
        encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        most = max(most, *map(len, encoded))
    return CaptionLength(most, folder)


def estimated_tokens(caption: str) -> int:
    """About how many tokens a caption has with the template, by its characters."""
    ascii_count = sum(map(str.isascii, caption))
    return TEMPLATE_TOKENS + -(-ascii_count // ASCII_PER_TOKEN) + len(caption) - ascii_count


def rendered(text: TextContextSpec, prompt: str) -> str:
    """`prompt` as the chat template of the flavour's tokenizer writes it."""
    if text.kind == "qwen3":
        return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    prompt = without_image_tokens(prompt)
    return f"<s>[SYSTEM_PROMPT]{text.system_message}[/SYSTEM_PROMPT][INST]{prompt}[/INST]"


def without_image_tokens(prompt: str) -> str:
    """`prompt` without Mistral's image tokens, which would be counted against images that are not there."""
    return prompt.replace("[IMG]", "")


def load_tokenizer(folder: Path, text: TextContextSpec, fix_regex: bool) -> "Tokenizer":
    """The tokenizer of a folder, in half the time that transformers takes, whose import it spares."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if fix_regex and text.kind == "mistral3":
        correct_pattern(tokenizer)
    return tokenizer


def correct_pattern(tokenizer: "Tokenizer") -> None:
    """Split as Mistral's own vocabulary file says, where tokenizer.json has Llama's pattern."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_TEKKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def find_tokenizer(options: ModelOptions) -> Path | None:
    """The tokenizer folder that a run with these options will use, if it is on this disk: in a local folder, in the
    Hub's cache, or of an embedded model that was made before. Nothing is downloaded, nothing made.
    """
    encoder = options.pretrained_text_encoder_model_name_or_path
    single = single_files(options).get("text_encoder")
    base = options.pretrained_model_name_or_path
    flavour = FLAVOURS[options.model_flavour]
    if base is None or is_weight_file(base):
        base = flavour.repo
    folders = []
    if single is not None or encoder is not None:
        root = single.parent if single is not None else _root(encoder or "", options)
        folders += [root / "tokenizer", root]
    if base is not None:
        folders.append(_root(base, options) / "tokenizer")
    else:
        cache_dir = options.cache_dir
        made = tiny.default_folder(None if cache_dir is None else Path(with_home(cache_dir)), os.environ, flavour.name)
        folders.append(made / "tokenizer")
    return next((folder for folder in folders if os.path.isfile(folder / "tokenizer.json")), None)


def _root(place: str, options: ModelOptions) -> Path:
    folder = Path(with_home(place))
    return cached_snapshot(options, place) if Hub.is_id(place) and not os.path.isdir(folder) else folder
