"""Encode prompts: the context is the concatenated residual stream of a language model after three of its layers."""

import abc
import bisect
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from simpletuner.base.errors import AccessError, ConfigError, DataError
from simpletuner.config.flavours import TextContextSpec
from simpletuner.flow.condition import TextContext
from simpletuner.flux2.tokenizer import without_image_tokens

ShareDone = Callable[[float], None]
"""Called repeatedly with the fraction of work done, 0 to 1. It may raise to stop the work."""


@dataclass(frozen=True)
class LeftPaddedCodec:
    """Stores left-padded contexts, whose padding rows are all equal, as one padding row, the text rows and the length.

    `key` identifies everything that a context depends on: weights, precision, template, layers, length, tokenizer
    settings.
    """

    key: str
    min_bytes: int = 0
    """Bytes of the shortest context that can be stored."""

    def pack(self, context: TextContext) -> Mapping[str, Tensor]:
        """The tensors to store for a context of one sample. The context must come from `left_padded`."""
        return {
            "rows": context.rows[1:],
            "pad": context.rows[0],
            "length": torch.tensor(context.index.shape[1]),
        }

    def unpack(self, stored: Mapping[str, Tensor]) -> TextContext:
        """The context that `pack` stored."""
        return left_padded(stored["rows"], stored["pad"], int(stored["length"]))


@dataclass(frozen=True)
class RightPaddedCodec:
    """Stores every row of a context: padding after a text attends to the text, so the padding rows differ.

    The fields are those of `LeftPaddedCodec`. All contexts have the same size.
    """

    key: str
    min_bytes: int = 0

    def pack(self, context: TextContext) -> Mapping[str, Tensor]:
        """The tensors to store for a context of one sample."""
        return {"rows": context.rows}

    def unpack(self, stored: Mapping[str, Tensor]) -> TextContext:
        """The context that `pack` stored."""
        return TextContext.dense(stored["rows"][None])


TextCodec = LeftPaddedCodec | RightPaddedCodec

CODECS: Mapping[Literal["left", "right"], type[LeftPaddedCodec] | type[RightPaddedCodec]] = {
    "left": LeftPaddedCodec,
    "right": RightPaddedCodec,
}
"""Codec classes by a flavour's `padding_side`."""


def left_padded(rows: Float[Tensor, "n d"], pad: Float[Tensor, " d"], length: int) -> TextContext:
    """A context of one sample: `pad` repeated to fill `length`, then `rows`."""
    index = (torch.arange(length) - (length - len(rows) - 1)).clamp(min=0)
    return TextContext(torch.cat([pad[None], rows]), index[None])


def zero_fully_masked_rows(model: Any) -> None:
    """Make every attention layer of `model`, transformers' MistralModel, output 0 for rows that attend to nothing.

    Such rows are padding before the first token. For them, torch's kernels return 0, NaN or the mean of all values. A
    NaN spreads: in the next layer it is among the values of every row, and 0 · NaN is NaN. With 0, each layer only adds
    its MLP, so the row depends on its token alone. Padding after the text attends to the text and is left unchanged.
    """
    latest: tuple[Bool[Tensor, "b 1 n n"], Bool[Tensor, "b n 1"]] | None = None

    def zero(_attention: Any, _inputs: Any, arguments: Any, output: tuple[Tensor, Any]) -> None:
        # The hook runs after the output projection, which has no bias. SDPA's mask is True where a row may attend, and
        # None if every row attends to something. All layers share one mask.
        nonlocal latest
        mask = arguments["attention_mask"]
        if mask is None:
            return
        if latest is None or mask is not latest[0]:
            latest = mask, ~mask[:, 0].any(-1, keepdim=True)
        output[0].masked_fill_(latest[1], 0)

    for layer in model.layers:
        layer.self_attn.register_forward_hook(zero, with_kwargs=True)


@dataclass(frozen=True)
class TokenBatch:
    """Padded token ids, the input of the language model, on the CPU."""

    ids: Int64[Tensor, "b n"]
    attention_mask: Int64[Tensor, "b n"]
    """0 for padding, else 1."""
    positions: Int64[Tensor, "1 n"]

    @property
    def tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.ids.numel()


class TextEncoder(abc.ABC):
    """Encodes prompts with the language model of a FLUX.2 model, as the reference implementation does.

    Contexts have the model's dtype and are on the CPU. For the same batch of prompts they are bit-identical, wherever
    the weights are stored. `text` defines the
    chat messages, the layers, the length of a context and the side of its padding.

    Raises:
        ConfigError: the template alone exceeds that length.
        AccessError: the tokenizer has no chat template or no padding token.
    """

    def __init__(self, tokenizer: Any, text: TextContextSpec) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._layers, self._max_length = text.layers, text.length
        self._truncated: dict[str, None] = {}
        self._control_tokens: dict[str, tuple[str, ...]] = {}
        self._pad: Tensor | None = None
        if tokenizer.chat_template is None or tokenizer.pad_token_id is None:
            raise AccessError.of(
                f"{tokenizer.name_or_path} has no {'padding token' if tokenizer.chat_template else 'chat template'}",
                remedy="Use the tokenizer folder that comes with the model.",
            )
        (template,) = self._tokenize([""])
        if len(template) > text.length:
            raise ConfigError.of(
                f"tokenizer_max_length = {text.length}", f"at least {len(template)}, which the template alone takes"
            )
        self._added = {index: str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
        self._template_added = self._count_added(template)

    @property
    def truncated(self) -> tuple[str, ...]:
        """The prompts that were truncated, of those tokenized so far by `lengths` or `encode`."""
        return tuple(self._truncated)

    @property
    def control_tokens(self) -> Mapping[str, tuple[str, ...]]:
        """Control tokens, such as [INST] or <|im_end|>, in the prompts tokenized so far, by prompt. As in the
        reference, the tokenizer does not encode them as text."""
        return self._control_tokens

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Number of tokens of each prompt, template included; at most `max_length`."""
        return [len(ids) for ids in self._fitted(prompts)]

    def encode(self, prompts: Sequence[str]) -> list[TextContext]:
        """The context of each prompt, computed as one batch."""
        (contexts,) = self.encode_batches([prompts])
        return contexts

    def encode_batches(
        self, batches: Sequence[Sequence[str]], report: ShareDone = lambda _share: None
    ) -> Generator[list[TextContext], None, None]:
        """Yield the contexts of each batch, in order, bit-identical to those that `encode` returns for it alone.

        `report` is called during long work before the first batch is yielded.

        Raises:
            DataError: a row is not finite. The message names its layer, and its prompt or padding.
        """
        fitted = [self._fitted(batch) for batch in batches]
        padded = [self._padded(ids) for ids in fitted]
        if self._text.padding_side == "left" and self._pad is None:
            # One padding token before one text token, which attends to itself: with both, the model builds a mask.
            padding_batch = self._padded([self._tokenize([""])[0][:1]])
            batch_states = self._states([padding_batch, *padded], report)
            pad = next(batch_states)[:, :1].clone()
            self._check_finite(pad, ["padding"])
            self._pad = pad[0, 0]
        else:
            batch_states = self._states(padded, report)
        for prompts, batch, states in zip(batches, fitted, batch_states, strict=True):
            self._check_finite(states, [repr(prompt) for prompt in prompts])
            yield [self._context(states[index], len(ids)) for index, ids in enumerate(batch)]

    def _context(self, states: Float[Tensor, "n d"], tokens: int) -> TextContext:
        """The context of one prompt with `tokens` tokens, from its padded rows."""
        if self._pad is None:
            return TextContext.dense(states[None].clone())
        return left_padded(states[len(states) - tokens :], self._pad, self._max_length)

    def _check_finite(self, states: Float[Tensor, "b n d"], titles: Sequence[str]) -> None:
        """Raise a DataError if a row of `states` is not finite, padding included. `titles` names each sample."""
        for layer, state in zip(self._layers, states.chunk(len(self._layers), dim=-1), strict=True):
            if not torch.isfinite(state).all():
                affected = ", ".join(
                    name for name, rows in zip(titles, state, strict=True) if not torch.isfinite(rows).all()
                )
                raise DataError.of(
                    f"the text encoder returned numbers that are not finite after layer {layer}, for {affected}",
                    remedy="Its weights are damaged, or exceed the range of fp16: download them again, or give "
                    "--mixed_precision=bf16.",
                )

    @abc.abstractmethod
    def _states(self, batches: Sequence[TokenBatch], report: ShareDone, /) -> Iterator[Float[Tensor, "b n d"]]:
        """The states of each batch after the chosen layers, concatenated along the last dimension, on the CPU."""

    def _fitted(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of at most `max_length`. A longer prompt is truncated at its end; its template stays complete."""
        is_mistral = self._text.kind == "mistral3"
        texts = [without_image_tokens(prompt) if is_mistral else prompt for prompt in prompts]
        fitted = self._tokenize(texts)
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if len(fitted[index]) > self._max_length:
                self._truncated[prompt] = None
                fitted[index] = self._shortened(text)
            if added := self._count_added(fitted[index]) - self._template_added:
                self._control_tokens[prompt] = tuple(added)
        return fitted

    def _count_added(self, ids: Sequence[int]) -> Counter[str]:
        """How often each added token, which no plain text produces, occurs in `ids`."""
        return Counter(self._added[index] for index in ids if index in self._added)

    def _shortened(self, text: str) -> list[int]:
        """Token ids of the longest beginning of `text` that takes at most `max_length` tokens, template included."""

        def tokens_with(characters: int) -> int:
            return len(self._tokenize([text[:characters]])[0])

        too_many = bisect.bisect_right(range(len(text)), self._max_length, key=tokens_with)
        return self._tokenize([text[: too_many - 1]])[0]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of `texts` in the chat template, without truncation and padding."""
        message = self._text.system_message
        system = [] if message is None else [{"role": "system", "content": [{"type": "text", "text": message}]}]
        # Mistral's template takes a list of parts, Qwen's a string. Qwen's prompt ends where an answer without thinking
        # would start.
        is_qwen = self._text.kind == "qwen3"
        chats = [
            [*system, {"role": "user", "content": text if is_qwen else [{"type": "text", "text": text}]}]
            for text in texts
        ]
        encoded = self._tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=is_qwen,
            tokenize=True,
            return_dict=True,
            padding=False,
            **({"enable_thinking": False} if is_qwen else {}),
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _padded(self, batch: Sequence[Sequence[int]]) -> TokenBatch:
        """Pad `batch` on the flavour's side.

        Left padding extends one token beyond the longest prompt, not to `max_length`: text rows do not depend on it.
        With the extra token, every batch whose longest prompt is shorter than `max_length` has padding, so all run the
        same attention code. Right padding extends to `max_length`, because the transformer reads these rows.
        """
        is_left = self._text.padding_side == "left"
        width = min(max(map(len, batch)) + 1, self._max_length) if is_left else self._max_length
        ids: Int64[Tensor, "b n"] = torch.full((len(batch), width), self._tokenizer.pad_token_id)
        mask = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, tokens in enumerate(batch):
            text = slice(width - len(tokens), width) if is_left else slice(len(tokens))
            ids[row, text] = torch.tensor(tokens)
            mask[row, text] = 1
        # Tokens have the positions that they would have in a batch padded to `max_length`.
        positions = torch.arange(self._max_length - width, self._max_length)[None]
        return TokenBatch(ids, mask, positions)


def control_token_notice(by_prompt: Mapping[str, Sequence[str]]) -> str:
    """A warning about prompts that spell control tokens. It states their number, the tokens and examples.

    Args:
        by_prompt: control tokens of each such prompt.
    """
    names = sorted({name for tokens in by_prompt.values() for name in tokens})
    examples = "; ".join(prompt[:60] + ("…" if len(prompt) > 60 else "") for prompt in list(by_prompt)[:3])
    count = "1 caption spells" if len(by_prompt) == 1 else f"{len(by_prompt)} captions spell"
    return (
        f"{count} control tokens of the text encoder, which does not read them as text: "
        f"{', '.join(names[:6])}{', …' if len(names) > 6 else ''}. Unless that is intended, spell them differently "
        f"(with a space inside): {examples}"
    )


class ResidentTextEncoder(TextEncoder):
    """A text encoder whose whole model is in memory.

    `model` is transformers' MistralModel or Qwen3Model, cut after the last of the layers of `text` and without the
    final norm, which would change the last state. Layers count from 1.
    """

    def __init__(self, model: Any, tokenizer: Any, text: TextContextSpec) -> None:
        super().__init__(tokenizer, text)
        self._model = model
        self._layer_outputs: dict[int, Tensor] = {}
        for layer in text.layers:
            model.layers[layer - 1].register_forward_hook(self._recording_hook(layer))

    def _states(self, batches: Sequence[TokenBatch], _report: ShareDone, /) -> Iterator[Float[Tensor, "b n d"]]:
        return map(self._forward, batches)

    @torch.no_grad()
    def _forward(self, batch: TokenBatch) -> Float[Tensor, "b n d"]:
        device = self._model.device
        self._model(
            input_ids=batch.ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            position_ids=batch.positions.to(device),
            use_cache=False,
        )
        states = torch.cat([self._layer_outputs[layer] for layer in self._layers], dim=-1).cpu()
        self._layer_outputs.clear()
        return states

    def _recording_hook(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            self._layer_outputs[layer] = output

        return hook
