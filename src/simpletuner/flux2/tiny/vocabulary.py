"""The embedded models' tokenizers: byte-level BPE trained on the text below, Mistral's or Qwen's special tokens."""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from simpletuner.config.flavours import FLAVOURS, TINY_KLEIN_TEXT
from simpletuner.examples import world

# Mistral-Small's ids: unknown 0, start 1, end 2, [IMG] 10, padding 11, system prompt 17 and 18.
SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
)

SIZE = 952
"""Vocabulary size: the special tokens, 256 bytes and the learned entries."""

# As in dev's tokenizer, digits form groups of three and case has no rule, so `tokenizer_fix_regex` changes the ids.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set text = message['content'] if message['content'] is string else message['content'][0]['text'] %}
    {%- if message['role'] == 'system' %}
        {{- '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST]' + text + '[/INST]' }}
    {%- else %}
        {{- text + eos_token }}
    {%- endif %}
{%- endfor %}
"""

CORPUS = """
a photograph of a red square on a white background
a photo of a blue circle above a green triangle
a painting of a small yellow house beside a river, soft morning light
a portrait of an old man with a grey beard, studio lighting, high detail
a portrait of a young woman in a black coat, shallow depth of field
a cinematic shot of a street at night, neon signs, rain, film grain, dramatic lighting
an artistic interpretation in the style of renaissance painting, oil on canvas
a professional photograph of a dog running on the beach, blue sky, clouds
a close-up of a cat sleeping on a wooden chair near the window
a wide landscape with mountains, a lake, tall trees and a path of stones
a bowl of fruit on a table: three apples, two oranges and a bunch of grapes
a drawing of a ship in a storm, black ink on old paper
a watercolour of flowers in a glass vase, pink, purple and orange
a bird in flight over the sea at sunset, long exposure
a steam train crossing a stone bridge, autumn forest, mist in the valley
the inside of a library with high shelves, warm light, people reading
a low-angle view of a skyscraper, glass and steel, bright sun, strong shadows
an abstract pattern of lines, dots and waves in gold, silver and turquoise
a child holding a balloon in a field of wheat, view from behind
a plate of food in a restaurant, seen from above, natural light
a vintage car parked in front of a bakery, 1950s, faded colours
a soft gradient from dark to light, number one
an astronaut riding a horse on the moon, digital art
a macro picture of a leaf with water drops
two friends walking through the snow under a large umbrella
a robot made of copper pipes, intricate detail, dark background
a poster with the words hello world in large white letters
a map of an island with a volcano, a harbour and a lighthouse
texture of brick, wood, fabric, leather, marble and sand
in the foreground, in the background, on the left, on the right, in the middle, at the bottom, at the top
a photo taken in 2024, a photo taken in 2023, a photo taken in 2022, a film of 2021
there is nothing in this image but colour, shape, size, material and position
"""


# Every word of the example scenes becomes one token, because a random text encoder cannot combine pieces of words.
WORLD = [f"a {word}, {word} background" for word in (*world.SIZES, *world.COLORS, *world.SHAPES, *world.POSITIONS)]


# Qwen's added tokens, in the order of their ids. KLEIN_ADDED are not special tokens: decoding keeps them.
KLEIN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
KLEIN_ADDED = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

KLEIN_SIZE = 640
"""Learned entries, including the 256 bytes. As in Qwen3, the embedding has more rows than the tokenizer has entries."""

# As in Qwen's tokenizer, every digit is a token.
KLEIN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

KLEIN_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def learn() -> Tokenizer:
    """Train the tokenizer of the embedded dev. Deterministic: merges go by count, ties by the lower pair of ids."""
    tokenizer = _untrained(PATTERN)
    # The system message precedes every prompt, and most prompts use words of the scenes: repeated, they become short.
    message = FLAVOURS["tiny"].text.system_message or ""
    _train(tokenizer, [message, *WORLD], SIZE, special=SPECIAL)
    return tokenizer


def learn_klein() -> Tokenizer:
    """Train the tokenizer of the embedded kleins. Deterministic."""
    tokenizer = _untrained(KLEIN_PATTERN)
    tokenizer.normalizer = normalizers.NFC()
    _train(tokenizer, ["user\n", "assistant\n", "\n\n", *WORLD], KLEIN_SIZE)
    tokenizer.add_special_tokens(list(KLEIN_SPECIAL))
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in KLEIN_ADDED])
    if tokenizer.get_vocab_size() > TINY_KLEIN_TEXT.vocabulary:
        raise ValueError("the embedding has fewer rows than the tokenizer has entries")
    return tokenizer


def _untrained(pattern: str) -> Tokenizer:
    """An untrained byte-level BPE tokenizer that splits texts by `pattern`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train(tokenizer: Tokenizer, frequent: list[str], size: int, *, special: tuple[str, ...] = ()) -> None:
    """Learn `size` entries, `special` ones first. Repeating the texts `frequent` makes their token sequences short."""
    tokenizer.train_from_iterator(
        frequent * 8 + CORPUS.strip().splitlines(),
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(special),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )


def files(tokenizer: Tokenizer) -> dict[str, str]:
    """The content of each file in the `tokenizer` folder, by name."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def klein_files() -> dict[str, str]:
    """The content of each file in the `tokenizer` folder of the embedded kleins, by name."""
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": learn_klein().to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "chat_template.jinja": KLEIN_CHAT_TEMPLATE,
    }
