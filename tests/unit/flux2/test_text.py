import dataclasses

import pytest
import torch

from simpletuner.base.errors import ConfigError
from simpletuner.config.flavours import FLAVOURS, SYSTEM_MESSAGE
from simpletuner.flux2.load import load_text_encoder
from simpletuner.flux2.source import Source
from simpletuner.flux2.text import CODECS, LeftPaddedCodec, TextEncoder, left_padded

END_OF_PROMPT = 4  # [/INST]


def load(source: Source, layers: tuple[int, ...] = (10, 20, 30), max_length: int = 512, **given) -> TextEncoder:
    source = dataclasses.replace(source, text_layers=layers, text_length=max_length)
    return load_text_encoder(source, torch.float32, "cpu", **{"fix_regex": False, **given})


@pytest.fixture
def encoder(tiny_source) -> TextEncoder:
    return load(tiny_source)


def test_padding_is_on_the_left_and_all_alike():
    encoded = left_padded(torch.ones(2, 3), torch.full((3,), 7.0), 5)
    assert encoded.expanded().tolist() == [[[7] * 3] * 3 + [[1] * 3] * 2]
    assert torch.equal(left_padded(torch.ones(5, 3), torch.zeros(3), 5).expanded(), torch.ones(1, 5, 3))


def test_what_is_stored_is_the_padding_once_and_comes_back_bit_for_bit(encoder):
    codec = LeftPaddedCodec("key")
    for encoded in encoder.encode(["a cat", "a red square on a white background"]):
        stored = codec.pack(encoded)
        assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
            "rows": (len(encoded.rows) - 1, 192),
            "pad": (192,),
            "length": (),
        }
        assert torch.equal(codec.unpack(stored).expanded(), encoded.expanded())


def test_the_prompt_goes_through_the_chat_template(encoder):
    (ids,) = encoder._tokenize(["a cat"])
    assert encoder._tokenizer.decode(ids) == (f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]a cat[/INST]")


def test_the_system_message_is_that_of_the_flavour(tiny_source):
    text = dataclasses.replace(tiny_source.flavour.text, system_message="Draw.")
    flavour = dataclasses.replace(tiny_source.flavour, text=text)
    encoder = load(dataclasses.replace(tiny_source, flavour=flavour))
    (ids,) = encoder._tokenize(["a cat"])
    assert encoder._tokenizer.decode(ids) == "<s>[SYSTEM_PROMPT]Draw.[/SYSTEM_PROMPT][INST]a cat[/INST]"


def test_every_flavour_has_a_codec_for_its_padding():
    assert {flavour.text.padding_side for flavour in FLAVOURS.values()} <= CODECS.keys()


def test_context_has_three_layers_side_by_side(encoder, tiny_source):
    (encoded,) = encoder.encode(["a cat"])
    assert encoded.rows.shape == (1 + encoder.lengths(["a cat"])[0], 3 * 64)
    assert encoded.expanded().shape == (1, 512, 3 * 64)
    (first,) = load(tiny_source, layers=(10,)).encode(["a cat"])
    assert torch.equal(encoded.rows[:, :64], first.rows)


def test_the_last_state_is_not_normed(tiny_source):
    (last,) = load(tiny_source, layers=(30,)).encode(["a cat"])
    (inner,) = load(tiny_source, layers=(30, 31)).encode(["a cat"])
    assert torch.equal(last.rows, inner.rows[:, :64])


def test_neighbors_in_a_batch_change_nothing_but_rounding(encoder):
    prompts = ["a cat", "", "a red square on a white background " * 4]
    together = encoder.encode(prompts)
    for prompt, encoded in zip(prompts, together, strict=True):
        (alone,) = encoder.encode([prompt])
        assert (alone.rows - encoded.rows).abs().max() <= 1e-5 * alone.rows.abs().max()
    again = encoder.encode(prompts)
    assert all(torch.equal(one.rows, two.rows) for one, two in zip(together, again, strict=True))


def test_image_tokens_in_a_prompt_are_removed(encoder):
    (with_token,), (without,) = encoder.encode(["a [IMG]cat"]), encoder.encode(["a cat"])
    assert torch.equal(with_token.rows, without.rows)


def test_a_prompt_that_just_fits_is_whole(tiny_source):
    needed = load(tiny_source).lengths(["a photo of a cat"])[0]
    encoder = load(tiny_source, max_length=needed)
    assert encoder.lengths(["a photo of a cat"]) == [needed]
    assert encoder.truncated == ()
    (encoded,) = encoder.encode(["a photo of a cat"])
    assert torch.equal(encoded.expanded()[0], encoded.rows[1:])


def test_a_longer_prompt_loses_its_end_and_not_the_template(tiny_source):
    encoder = load(tiny_source, max_length=64)
    prompt = "a photo of a dog running on the beach, " * 30
    (ids,) = encoder._fitted([prompt])
    text = encoder._tokenizer.decode(ids)
    head, tail = f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]", "[/INST]"
    assert text.startswith(head)
    assert text.endswith(tail)
    kept = text.removeprefix(head).removesuffix(tail)
    assert prompt.startswith(kept)
    assert 60 <= len(ids) <= 64
    # One more character would not have fitted.
    assert len(encoder._tokenize([prompt[: len(kept) + 1]])[0]) > 64
    assert encoder.lengths([prompt]) == [len(ids)]
    assert encoder.encode([prompt])[0].index.shape == (1, 64)


def test_shortened_prompts_are_named_once(tiny_source):
    encoder = load(tiny_source, max_length=64)
    long = "a cat on a mat " * 40
    encoder.lengths(["a cat", long])
    encoder.encode([long])
    assert encoder.truncated == (long,)


def test_a_limit_below_the_template(tiny_source):
    with pytest.raises(ConfigError, match=r"tokenizer_max_length = 16: expected at least 32"):
        load(tiny_source, max_length=16)


def test_the_regex_setting_changes_ids_where_digits_meet(encoder, tiny_source):
    fixed = load(tiny_source, fix_regex=True)
    assert fixed._tokenize(["a cat on a mat"]) == encoder._tokenize(["a cat on a mat"])
    (before,), (after,) = encoder._tokenize(["in 2024"]), fixed._tokenize(["in 2024"])
    assert len(after) > len(before)
    assert fixed._tokenizer.decode(after).endswith("[INST]in 2024[/INST]")
