"""The real tokenizers of dev and klein: our ids against mistral-common's and tiktoken's, and what captions cost."""

import dataclasses
import fcntl
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tokenizer_fixtures as fixtures
from simpletuner.config.flavours import FLAVOURS, FlavourName
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2 import tokenizer as counting
from simpletuner.flux2.load import _tokenizer
from simpletuner.flux2.source import Source, Weights, locate
from simpletuner.flux2.text import ResidentTextEncoder, TextEncoder, control_token_notice
from simpletuner.flux2.tiny import vocabulary

GOLDEN: dict[str, dict[str, Any]] = json.loads((fixtures.FOLDER / "golden.json").read_text(encoding="utf-8"))
GOLDEN_WINDOW = (
    "1 17 4568 1584 1420 26554 1455 12738 2314 3937 38340 1046 3213 5628 37253 11688 30557 1408 3481 14608 1044 3481 "
    "1010 2452 5604 1321 10636 3816 67813 1046 18 3 1065 102244 1279 5744 16649 1307 1261 4804 94137 15866 1408 1261 "
    "119766 1121 9091 1294 1261 11692 1121 17144 1513 54507 1044 100989 4391 1044 1032 1056 1053 8383 20993 4"
)
"""Published by a port of FLUX.2 that was tested with the model's own tokenizer.json."""

LONG, CONTROL = "too long", "control tokens"
SPLIT_OTHERWISE = {"Hindi", "Tamil", "Thai"}
"""Captions that the pattern of FLUX.2-dev's file splits into other tokens than Mistral's own: it takes the marks of
vowels from their letters.
"""
DOCS = Path(__file__).parents[2] / "docs" / "tokenizers.md"


def source_of(flavour: FlavourName, folder: Path) -> Source:
    """A model of which only the tokenizer is there."""
    nothing = Weights((), None)
    text = FLAVOURS[flavour].text
    return Source("model", FLAVOURS[flavour], None, nothing, nothing, nothing, folder, text.layers, text.length, None)


def encoder_of(source: Source, fix_regex: bool = False) -> TextEncoder:
    """A text encoder that tokenizes and pads, and has no layers."""
    return ResidentTextEncoder(None, _tokenizer(source, fix_regex), dataclasses.replace(source.text, layers=()))


def folder_of(name: str, shared_folder: Path, write: Callable[[Path], None]) -> Path:
    """A pipeline's folder with nothing but its tokenizer, made once per session."""
    folder = shared_folder / name
    with (shared_folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            write(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def dev_folder(shared_folder: Path) -> Path:
    """As transformers 5 would pad on the right: the class of FLUX.2-dev's folder, and no side."""

    def write(folder: Path) -> None:
        fixtures.write_dev_tokenizer(folder, vocabulary.CHAT_TEMPLATE, padding_side=None)

    return folder_of("dev-tokenizer", shared_folder, write)


@pytest.fixture(scope="session")
def klein_folder(shared_folder: Path) -> Path:
    """With a side that klein must not pad on."""

    def write(folder: Path) -> None:
        fixtures.write_klein_tokenizer(folder, vocabulary.KLEIN_CHAT_TEMPLATE, padding_side="left")

    return folder_of("klein-tokenizer", shared_folder, write)


@pytest.fixture(scope="session")
def dev(dev_folder: Path) -> TextEncoder:
    return encoder_of(source_of("dev", dev_folder / "tokenizer"))


@pytest.fixture(scope="session")
def klein(klein_folder: Path) -> TextEncoder:
    return encoder_of(source_of("klein-4b", klein_folder / "tokenizer"))


@pytest.fixture
def corrected(dev: TextEncoder) -> Any:
    """dev's encoder with `tokenizer_fix_regex`, for one test: loading the vocabulary twice takes a second."""
    backend = dev._tokenizer.backend_tokenizer
    loaded = backend.pre_tokenizer
    counting.correct_pattern(backend)
    yield dev
    backend.pre_tokenizer = loaded


def captions(*left_out: str) -> list[str]:
    return [entry["caption"] for name, entry in GOLDEN.items() if name not in left_out]


def ids_of(kind: str, *left_out: str) -> list[list[int]]:
    return [entry[kind] for name, entry in GOLDEN.items() if name not in left_out]


def test_dev_ids_with_the_corrected_pattern_are_those_of_mistral_common(corrected: TextEncoder) -> None:
    assert corrected._fitted(captions(LONG, CONTROL)) == ids_of("dev", LONG, CONTROL)


def test_dev_ids_with_its_own_pattern_differ_where_vowels_are_marks_and_nowhere_else(dev: TextEncoder) -> None:
    found = dict(zip(GOLDEN, dev._fitted(captions()), strict=True))
    differing = {name for name, ids in found.items() if ids != GOLDEN[name]["dev"]} - {LONG, CONTROL}
    assert differing == SPLIT_OTHERWISE
    for name in SPLIT_OTHERWISE:
        assert len(found[name]) > len(GOLDEN[name]["dev"])


def test_dev_ids_are_those_published_of_the_model(dev: TextEncoder) -> None:
    assert dev._fitted([fixtures.CAPTIONS["English, long"]]) == [[int(number) for number in GOLDEN_WINDOW.split()]]


def test_klein_ids_are_those_of_tiktoken(klein: TextEncoder) -> None:
    assert klein._fitted(captions(LONG)) == ids_of("klein", LONG)


def test_the_empty_prompt_of_klein_is_twelve_tokens(klein: TextEncoder) -> None:
    expected = [151644, 872, 198, 151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271]
    assert klein._fitted([""]) == [expected]


def test_a_caption_too_long_for_dev_loses_its_end_and_no_other_token(dev: TextEncoder) -> None:
    whole = GOLDEN[LONG]["dev"]
    (ids,) = dev._fitted([GOLDEN[LONG]["caption"]])
    assert len(whole) > 512 >= len(ids) > 505
    assert ids[-1] == whole[-1] == 4
    # The last word may be cut into other tokens.
    assert ids[:-3] == whole[: len(ids) - 3]


def test_a_caption_too_long_for_klein_keeps_the_answers_beginning(klein: TextEncoder) -> None:
    whole, end = GOLDEN[LONG]["klein"], GOLDEN["empty"]["klein"][-9:]
    (ids,) = klein._fitted([GOLDEN[LONG]["caption"]])
    assert len(whole) > 512 >= len(ids) > 505
    assert ids[-9:] == whole[-9:] == end
    assert ids[:-12] == whole[: len(ids) - 12]


def test_captions_of_all_languages_come_back_from_their_tokens(dev: TextEncoder, klein: TextEncoder) -> None:
    for encoder, form in ((dev, None), (klein, "NFC")):
        backend = encoder._tokenizer.backend_tokenizer
        for caption in captions(CONTROL):
            expected = caption if form is None else unicodedata.normalize("NFC", caption)
            assert backend.decode(backend.encode(caption, add_special_tokens=False).ids) == expected


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"])
def test_dev_is_padded_on_the_left_whatever_its_folder_says(tmp_path: Path, side: str | None, name: str) -> None:
    for file, text in vocabulary.files(vocabulary.learn()).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"tokenizer_class": name, "padding_side": side}
    config.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    encoder = encoder_of(source_of("tiny", tmp_path))
    assert encoder._tokenizer.padding_side == "left"
    (ids,) = encoder._fitted(["a cat"])
    assert ids[-1] == 4
    padded = encoder._padded([ids, ids[:3]])
    assert padded.ids[1].tolist() == [11] * (len(ids) - 2) + ids[:3]
    assert padded.attention_mask[1].tolist() == [0] * (len(ids) - 2) + [1] * 3


def test_the_real_vocabularies_are_padded_on_the_flavours_side(dev: TextEncoder, klein: TextEncoder) -> None:
    for encoder, pad in ((dev, 11), (klein, 151643)):
        ids = encoder._fitted(["a cat"])
        rows = encoder._padded(ids)
        is_left = encoder is dev
        assert encoder._tokenizer.padding_side == ("left" if is_left else "right")
        assert rows.ids[0, rows.attention_mask[0] == 1].tolist() == ids[0]
        assert int(rows.ids[0, 0 if is_left else -1]) == pad
        assert bool(rows.attention_mask[0, -1 if is_left else 0])


def test_captions_that_spell_control_tokens_keep_them_and_are_named(dev: TextEncoder, klein: TextEncoder) -> None:
    caption = GOLDEN[CONTROL]["caption"]
    for encoder, names in ((dev, ("[INST]", "</s>")), (klein, ("<|im_end|>",))):
        encoder._control_tokens.clear()
        encoder.lengths(["a cat", "[ INST ]", caption, caption])
        assert encoder.control_tokens == {caption: names}
    # mistral-common reads letters there; the reference, and so this program, reads the token.
    assert GOLDEN[CONTROL]["dev"].count(3) == 1
    assert dev._fitted([caption])[0].count(3) == 2
    notice = control_token_notice({caption: ("[INST]", "</s>"), "[INST]": ("[INST]",)})
    assert notice.startswith("2 captions spell control tokens of the text encoder")
    assert "</s>, [INST]" in notice


def test_the_plan_counts_the_tokens_that_the_encoder_reads(
    corrected: TextEncoder, klein: TextEncoder, klein_folder: Path
) -> None:
    for encoder in (corrected, klein):
        backend = encoder._tokenizer.backend_tokenizer
        for prompt in captions(LONG):
            counted = backend.encode(counting.rendered(encoder._text, prompt), add_special_tokens=False).ids
            assert len(counted) == encoder.lengths([prompt])[0]
    options = ModelOptions(model_flavour="klein-4b", pretrained_model_name_or_path=str(klein_folder))
    found = counting.longest_caption(captions(LONG), options)
    assert found == counting.CaptionLength(max(klein.lengths(captions(LONG))), klein_folder / "tokenizer")


@pytest.mark.parametrize("fix_regex", [False, True])
def test_the_embedded_models_tokens_are_counted_exactly(tiny_folder: Path, fix_regex: bool) -> None:
    options = ModelOptions(pretrained_model_name_or_path=str(tiny_folder), tokenizer_fix_regex=fix_regex)
    encoder = encoder_of(dataclasses.replace(locate(options, report=print), text_length=4096), fix_regex)
    for prompt in (*captions(), "a [IMG]cat"):
        assert counting.longest_caption([prompt], options).tokens == encoder.lengths([prompt])[0]


def test_the_longest_caption_is_found_among_many(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ModelOptions(pretrained_model_name_or_path=str(tiny_folder))
    monkeypatch.setattr(counting, "BATCH", 2)
    prompts = ["a " * 30, "photo " * 11, "§" * 40, "a cat", "", "中文" * 20]
    expected = max(counting.longest_caption([prompt], options).tokens for prompt in prompts)
    assert counting.longest_caption(prompts, options).tokens == expected


def test_an_estimate_by_characters_is_enough_for_every_language() -> None:
    options = ModelOptions(model_flavour="dev", pretrained_model_name_or_path="acme/nowhere")
    for entry in GOLDEN.values():
        found = counting.longest_caption([entry["caption"]], options)
        assert found.tokenizer is None
        assert max(len(entry["dev"]), len(entry["klein"])) <= found.tokens


def test_the_table_of_ten_captions_is_in_the_docs(dev: TextEncoder, klein: TextEncoder) -> None:
    table = ["| language | caption | dev | dev, corrected | klein |", "|---|---|---:|---:|---:|"]
    for name, caption in fixtures.CAPTIONS.items():
        corrected = len(GOLDEN[name]["dev"])
        (plain,), (kleins,) = dev.lengths([caption]), klein.lengths([caption])
        table.append(f"| {name} | {caption} | {plain} | {corrected} | {kleins} |")
    assert len(table) == 12
    assert "\n".join(table) in DOCS.read_text(encoding="utf-8")
