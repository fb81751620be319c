"""Write the vocabularies of FLUX.2's real tokenizers as small files for the tests, and make tokenizer folders of them.

The tests do not need the two packages below. To make the files again, in a separate environment:

    pip install mistral-common==1.9.1 && pip install --no-deps dashscope==2.0.2
    PYTHONPATH=src python tools/tokenizer_fixtures.py [--tekken FILE] [--qwen FILE]

A vocabulary is stored as its 256 bytes and, for each further token, the ids of the two tokens that it joins: a sixth
smaller than its texts, and no merges have to be searched for. The expected ids come from mistral-common's own chat
encoding and from its dependency tiktoken; this program uses neither of them to tokenize.
"""

import argparse
import base64
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import lzma
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpletuner.config.flavours import SYSTEM_MESSAGE

FOLDER = Path(__file__).parents[1] / "tests" / "fixtures" / "tokenizers"
DEV, KLEIN = "tekken_240911", "qwen"
"""Names of the vocabularies in their packages."""

PACKAGES = {DEV: ("mistral-common", "1.9.1"), KLEIN: ("dashscope", "2.0.2")}
SHA256 = {
    DEV: "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316",
    KLEIN: "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
}
"""Hashes of the files that the fixtures are made from."""

DEV_SPECIAL_COUNT = 1000
DEV_TOKENS = 131_072 - DEV_SPECIAL_COUNT
"""Tokens of tekken_240911.json that the model knows: the first ones."""

DEV_SPECIAL = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    14: "[PREFIX]",
    15: "[MIDDLE]",
    16: "[SUFFIX]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
}

KLEIN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
KLEIN_ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
"""Added tokens that are not special: decoding keeps them."""

_ENGLISH_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
DEV_PATTERN = (
    rf"{_ENGLISH_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As in FLUX.2-dev's tokenizer.json: Llama's, not the one in tekken_240911.json."""
KLEIN_PATTERN = DEV_PATTERN.replace("{1,3}", "")

CAPTIONS: Mapping[str, str] = {
    "English": "a photo of a red fox in the snow",
    "English, long": "A photorealistic photo of a red fox standing on a mossy rock in a misty forest at dawn, "
    "volumetric light, 85mm lens",
    "German": "Ein Gemälde einer Straßenecke bei Nacht, regennasser Asphalt, Öl auf Leinwand",
    "French": "Une vieille librairie à l'aube, façade bleue, où dort un chat roux",
    "Japanese": "桜の木の下で本を読む女性、柔らかい朝の光、水彩画",
    "Chinese": "一只戴着红色围巾的狐狸坐在雪地里,远处是群山",
    "Russian": "Старый деревянный дом у замёрзшего озера, густой туман, плёночная фотография",
    "Arabic": "قطة سوداء تجلس على نافذة خشبية قديمة عند الغروب",
    "Hindi": "बर्फ में बैठी एक लाल लोमड़ी, सुबह की कोमल रोशनी",
    "Mixed": "sks犬 🐕‍🦺 im Café, 35mm f/1.4, ISO 800 — «été 2024» №7, ＡＢＣ",
}
"""The captions in the table of docs/tokenizers.md."""

HARD: Mapping[str, str] = {
    "empty": "",
    "Tamil": "பனியில் அமர்ந்திருக்கும் சிவப்பு நரி",
    "Thai": "จิ้งจอกแดงนั่งอยู่บนหิมะ",
    "Korean": "눈 속에 앉아 있는 붉은 여우",
    "Greek": "μια κόκκινη αλεπού στο χιόνι",
    "Hebrew": "שועל אדום בשלג",
    "decomposed": unicodedata.normalize("NFD", "façade élégante, Ångström, ñandú"),
    "joined emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "digits": "in 1984, 12345678 stars, 3.14159",
    "camel case": "sksPerson in a NeonCity, HTTPServer",
    "paths": "https://example.org/a//b\n//\n",
    "too long": "an old wooden house by a frozen lake in thick fog, shot on film, " * 40,
    "control tokens": "a poster that says [INST] and <|im_end|>, </s>",
    "white space": "  two  spaces\tand\r\n\r\nlines  \n ",
}
"""Captions that are difficult for tokenizers."""


def pack(tokens: Sequence[bytes]) -> bytes:
    """A vocabulary in the order of its ids, compressed. Its first 256 tokens are the bytes.

    Raises:
        ValueError: a token cannot be joined from two that come before it.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    left, right = [], []
    for index, token in enumerate(tokens[256:], 256):
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            joined = [ids.get(one + two, index) for one, two in itertools.pairwise(parts)]
            first = min(joined)
            if first == index:
                break
            at = joined.index(first)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) != 2:
            raise ValueError(f"token {index} is no pair of tokens before it")
        left.append(ids[parts[0]])
        right.append(ids[parts[1]])
    # Byte by byte of all ids, not id by id: three quarters of the size.
    planes = b"".join(
        bytes(value >> shift & 255 for value in values) for values in (left, right) for shift in (0, 8, 16)
    )
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    return lzma.compress(b"".join(tokens[:256]) + planes, filters=filters)


def unpack(data: bytes) -> tuple[list[bytes], list[tuple[int, int]]]:
    """The tokens that `pack` stored, and the pair of ids of each from the 256th on."""
    plain = lzma.decompress(data)
    tokens = [plain[at : at + 1] for at in range(256)]
    count = (len(plain) - 256) // 6
    planes = [plain[256 + at * count : 256 + (at + 1) * count] for at in range(6)]
    pairs = [(a | b << 8 | c << 16, d | e << 8 | f << 16) for a, b, c, d, e, f in zip(*planes, strict=True)]
    for left, right in pairs:
        tokens.append(tokens[left] + tokens[right])
    return tokens, pairs


def write_dev_tokenizer(folder: Path, chat_template: str, **config: Any) -> None:
    """FLUX.2-dev's tokenizer folder; `config` overrides tokenizer_config.json, None leaves a key out.

    As in the model's file there is a merge for each way to join two tokens to a third: mistral-common joins all of
    them, and not only the pairs that the vocabulary was learned with.
    """
    tokens, _ = unpack((FOLDER / f"{DEV}.xz").read_bytes())
    names = _printable(tokens)
    ids = {name: index for index, name in enumerate(names)}
    merges = []
    for name in names[256:]:
        found = []
        for at in range(1, len(name)):
            left = ids.get(name[:at])
            if left is not None and (right := ids.get(name[at:])) is not None:
                found.append((left, right))
        merges += [f"{names[left]} {names[right]}" for left, right in sorted(found)]
    special = [DEV_SPECIAL.get(index, f"<SPECIAL_{index}>") for index in range(DEV_SPECIAL_COUNT)]
    vocabulary = {name: index for index, name in enumerate([*special, *names])}
    added = [(index, name, True) for index, name in enumerate(special)]
    model = {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": merges}
    settings = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "padding_side": "left",
        **config,
    }
    _write(folder, model, added, None, DEV_PATTERN, settings, chat_template)


def write_klein_tokenizer(folder: Path, chat_template: str, **config: Any) -> None:
    """Write FLUX.2-klein's tokenizer folder, as `write_dev_tokenizer` writes dev's."""
    tokens, pairs = unpack((FOLDER / f"{KLEIN}.xz").read_bytes())
    names = _printable(tokens)
    added = list(enumerate((*KLEIN_SPECIAL, *KLEIN_ADDED), len(names)))
    model = {
        "type": "BPE",
        "vocab": {name: index for index, name in enumerate(names)},
        "merges": [f"{names[left]} {names[right]}" for left, right in pairs],
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        **config,
    }
    marked = [(index, name, name in KLEIN_SPECIAL) for index, name in added]
    _write(folder, model, marked, {"type": "NFC"}, KLEIN_PATTERN, settings, chat_template)


def _write(
    folder: Path,
    model: Mapping[str, Any],
    added: Sequence[tuple[int, str, bool]],
    normalizer: Mapping[str, str] | None,
    pattern: str,
    config: Mapping[str, Any],
    chat_template: str,
) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": name, "special": own, **flags} for index, name, own in added],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _printable(tokens: Sequence[bytes]) -> list[str]:
    """Tokens as tokenizer.json writes them: a character for each byte, none of them a space or a control character."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {byte: 256 + index for index, byte in enumerate(hidden)}
    return [token.decode("latin-1").translate(table) for token in tokens]


def tekken_tokens(path: Path) -> list[bytes]:
    """The tokens of tekken_240911.json that the model knows."""
    vocabulary = json.loads(path.read_text(encoding="utf-8"))["vocab"]
    return [base64.b64decode(entry["token_bytes"]) for entry in vocabulary[:DEV_TOKENS]]


def qwen_tokens(path: Path) -> list[bytes]:
    """The tokens of qwen.tiktoken."""
    return [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]


def dev_ids(tekken: Path, captions: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each caption after the system message, by mistral-common's chat encoding of version 7."""
    messages = importlib.import_module("mistral_common.protocol.instruct.messages")
    request = importlib.import_module("mistral_common.protocol.instruct.request")
    mistral = importlib.import_module("mistral_common.tokens.tokenizers.mistral")
    content = json.loads(tekken.read_text(encoding="utf-8"))
    # The file says v3, which would put the system message into the user's turn.
    content["config"]["version"] = "v7"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tekken.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        tokenizer = mistral.MistralTokenizer.from_file(path)
    for caption in captions:
        chat = [messages.SystemMessage(content=SYSTEM_MESSAGE), messages.UserMessage(content=caption)]
        yield tokenizer.encode_chat_completion(request.ChatCompletionRequest(messages=chat)).tokens


def klein_ids(tokens: Sequence[bytes], captions: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each caption in the chat format without thinking, by tiktoken, which does no Unicode normalization."""
    special = {name: index for index, name in enumerate((*KLEIN_SPECIAL, *KLEIN_ADDED), len(tokens))}
    ranks = {token: index for index, token in enumerate(tokens)}
    encoding = importlib.import_module("tiktoken").Encoding(
        "qwen", pat_str=KLEIN_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    for caption in captions:
        text = unicodedata.normalize("NFC", caption)
        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        yield encoding.encode(chat, allowed_special="all")


def checked(path: Path, name: str) -> Path:
    """Check that `path` holds the named vocabulary; returns it.

    Raises:
        ValueError: it does not.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256[name]:
        raise ValueError(f"{path} has sha256 {found}, expected {SHA256[name]}")
    return path


def main() -> None:
    """Write the fixtures: vocabularies, expected ids, license."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--tekken", type=Path, help="path of tekken_240911.json; by default from the installed mistral-common"
    )
    parser.add_argument("--qwen", type=Path, help="path of qwen.tiktoken; by default from the installed dashscope")
    given = parser.parse_args()
    tekken = checked(given.tekken or _installed("mistral-common", "mistral_common/data/tekken_240911.json"), DEV)
    qwen = checked(given.qwen or _installed("dashscope", "dashscope/resources/qwen.tiktoken"), KLEIN)
    known = {DEV: tekken_tokens(tekken), KLEIN: qwen_tokens(qwen)}
    for name, tokens in known.items():
        (FOLDER / f"{name}.xz").write_bytes(pack(tokens))
    captions = {**CAPTIONS, **HARD}
    dev, klein = dev_ids(tekken, [*captions.values()]), klein_ids(known[KLEIN], [*captions.values()])
    golden = {
        name: {"caption": captions[name], "dev": one, "klein": two}
        for name, one, two in zip(captions, dev, klein, strict=True)
    }
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in golden.items())
    (FOLDER / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _installed(package: str, path: str) -> Path:
    """Path of a file in an installed package."""
    return Path(str(importlib.metadata.distribution(package).locate_file(path)))


if __name__ == "__main__":
    main()
