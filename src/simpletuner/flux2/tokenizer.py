"""Find and load a FLUX.2 tokenizer without its text encoder, and count the tokens of captions."""

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
from simpletuner.flux2.model_locations import Hub, cached_snapshot
from simpletuner.flux2.single import single_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Mistral's pre-tokenizer, as in tekken.json: it distinguishes case, and every digit is a token.
_TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BATCH = 1000
"""Captions that are tokenized at a time."""
COUNTED_LIMIT = 10_000
"""Maximum number of captions that are tokenized, the longest in bytes first. At 100 tokens each, they take one core one
second."""

ASCII_PER_TOKEN = 3
"""Lower bound of ASCII characters per token; English has about 4.5. Each other character counts as
one token, which only rare ones exceed.
"""
TEMPLATE_TOKENS = 64
"""Upper bound for the tokens of the chat template around a caption."""


@dataclass(frozen=True)
class CaptionLength:
    """Token count of the longest caption, template included."""

    tokens: int
    tokenizer: Path | None
    """Folder of the tokenizer that counted; None if the count is estimated from characters."""


def longest_caption(captions: Collection[str], options: ModelOptions) -> CaptionLength:
    """The token count of the longest of `captions`, estimated if the model's tokenizer is not stored locally.

    Raises:
        AccessError: the tokenizer's file is damaged.
    """
    folder = find_tokenizer(options)
    if folder is None:
        return CaptionLength(max(map(estimated_tokens, captions)), None)
    check_tokenizer(folder, ("tokenizer.json",))
    text = FLAVOURS[options.model_flavour].text
    tokenizer = load_tokenizer(folder, text, options.tokenizer_fix_regex)
    # A token has at least one byte, so captions with fewer bytes than the maximum so far need no count.
    ordered = sorted(captions, key=lambda caption: len(caption.encode()), reverse=True)[:COUNTED_LIMIT]
    longest, template_length = 0, len(tokenizer.encode(rendered(text, ""), add_special_tokens=False))
    for start in range(0, len(ordered), BATCH):
        if template_length + len(ordered[start].encode()) <= longest:
            break
        batch = [rendered(text, caption) for caption in ordered[start : start + BATCH]]
        encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        longest = max(longest, *map(len, encoded))
    return CaptionLength(longest, folder)


def estimated_tokens(caption: str) -> int:
    """Estimate of a caption's tokens, template included, from its characters."""
    ascii_count = sum(map(str.isascii, caption))
    return TEMPLATE_TOKENS + -(-ascii_count // ASCII_PER_TOKEN) + len(caption) - ascii_count


def rendered(text: TextContextSpec, prompt: str) -> str:
    """`prompt` in the chat template of the flavour's tokenizer."""
    if text.kind == "qwen3":
        return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    prompt = without_image_tokens(prompt)
    return f"<s>[SYSTEM_PROMPT]{text.system_message}[/SYSTEM_PROMPT][INST]{prompt}[/INST]"


def without_image_tokens(prompt: str) -> str:
    """`prompt` without Mistral's image tokens, for which the tokenizer would expect images."""
    return prompt.replace("[IMG]", "")


def load_tokenizer(folder: Path, text: TextContextSpec, fix_regex: bool) -> "Tokenizer":
    """Load the tokenizer of a folder without importing transformers, in half the time that transformers takes."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if fix_regex and text.kind == "mistral3":
        correct_pattern(tokenizer)
    return tokenizer


def correct_pattern(tokenizer: "Tokenizer") -> None:
    """Replace Llama's split pattern in tokenizer.json by that of Mistral's own vocabulary file."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_TEKKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def find_tokenizer(options: ModelOptions) -> Path | None:
    """The tokenizer folder that a run with these options uses; None if it is not stored locally.

    It may be in a local folder, the Hub's cache or an existing embedded model. Nothing is downloaded or generated.
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
        embedded = tiny.default_folder(
            None if cache_dir is None else Path(with_home(cache_dir)), os.environ, flavour.name
        )
        folders.append(embedded / "tokenizer")
    return next((folder for folder in folders if os.path.isfile(folder / "tokenizer.json")), None)


def _root(folder_or_id: str, options: ModelOptions) -> Path:
    folder = Path(with_home(folder_or_id))
    return cached_snapshot(options, folder_or_id) if Hub.is_id(folder_or_id) and not os.path.isdir(folder) else folder
