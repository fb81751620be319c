"""Prompts to context: the residual stream of a language model after three of its layers, side by side."""

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
"""Called now and then with the share of the work that is done, from 0 to 1; may raise to stop it."""


@dataclass(frozen=True)
class LeftPaddedCodec:
    """Stores contexts that are padded on the left with copies of one row as that row, the other rows and the length.

    `key` names everything that decides a context: weights, precision, template, layers, length, tokenizer settings.
    """

    key: str
    least_bytes: int = 0
    """Bytes of the shortest context that can be stored."""

    def pack(self, context: TextContext) -> Mapping[str, Tensor]:
        """The tensors to store of a context of one sample, made by `left_padded`."""
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
    """Stores every row of a context: padding behind a text attends to the text, so each padding row differs.

    Both fields as in `LeftPaddedCodec`. All contexts have the same size.
    """

    key: str
    least_bytes: int = 0

    def pack(self, context: TextContext) -> Mapping[str, Tensor]:
        """The tensors to store of a context of one sample."""
        return {"rows": context.rows}

    def unpack(self, stored: Mapping[str, Tensor]) -> TextContext:
        """The context that `pack` stored."""
        return TextContext.dense(stored["rows"][None])


TextCodec = LeftPaddedCodec | RightPaddedCodec

CODECS: Mapping[Literal["left", "right"], type[LeftPaddedCodec] | type[RightPaddedCodec]] = {
    "left": LeftPaddedCodec,
    "right": RightPaddedCodec,
}
"""By a flavour's `padding_side`."""


def left_padded(rows: Float[Tensor, "n d"], pad: Float[Tensor, " d"], length: int) -> TextContext:
    """A context of one sample: `pad` as often as it takes to fill `length`, then `rows`."""
    index = (torch.arange(length) - (length - len(rows) - 1)).clamp(min=0)
    return TextContext(torch.cat([pad[None], rows]), index[None])


def zero_fully_masked_rows(model: Any) -> None:
    """Make every attention layer of `model`, transformers' MistralModel, give 0 in rows that attend to nothing.

    Such rows are padding before the first token. Torch's kernels give 0, NaN or a mean of all values there, and a NaN
    spreads: in the next layer it is a value of every row, and a weight of 0 times NaN is NaN. With 0, a row depends on
    its token alone: each layer adds its MLP to it. Padding behind the text attends to the text and stays as it is.
    """
    latest: tuple[Bool[Tensor, "b 1 n n"], Bool[Tensor, "b n 1"]] | None = None

    def zero(_attention: Any, _inputs: Any, given: Any, output: tuple[Tensor, Any]) -> None:
        # Behind the output projection, which has no bias: 0 stays 0. SDPA's mask is True where a row may look; there is
        # none where all rows see something, and else one for all layers.
        nonlocal latest
        mask = given["attention_mask"]
        if mask is None:
            return
        if latest is None or mask is not latest[0]:
            latest = mask, ~mask[:, 0].any(-1, keepdim=True)
        output[0].masked_fill_(latest[1], 0)

    for layer in model.layers:
        layer.self_attn.register_forward_hook(zero, with_kwargs=True)


@dataclass(frozen=True)
class TokenBatch:
    """Padded token ids as the language model takes them, on the CPU."""

    ids: Int64[Tensor, "b n"]
    seen: Int64[Tensor, "b n"]
    """0 where there is padding, else 1."""
    positions: Int64[Tensor, "1 n"]

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.ids.numel()


class TextEncoder(abc.ABC):
    """Embeds prompts with the language model of a FLUX.2, as the reference does.

    Contexts come in the model's own type, on the CPU. They are the same bits however the weights are held, as long as
    a batch has the same prompts. `text` says how prompts are put into the tokenizer's chat template and padded.

    Raises:
        ConfigError: `max_length` leaves no room for the template.
        AccessError: the tokenizer has no chat template or no padding token.
    """

    def __init__(self, tokenizer: Any, *, text: TextContextSpec, layers: tuple[int, ...], max_length: int) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._layers = layers
        self._max_length = max_length
        self._truncated: dict[str, None] = {}
        self._control_tokens: dict[str, tuple[str, ...]] = {}
        self._pad: Tensor | None = None
        if tokenizer.chat_template is None or tokenizer.pad_token_id is None:
            raise AccessError.of(
                f"{tokenizer.name_or_path} has no {'padding token' if tokenizer.chat_template else 'chat template'}",
                remedy="Use the tokenizer folder that comes with the model.",
            )
        (template,) = self._tokenize([""])
        if len(template) > max_length:
            raise ConfigError.of(
                f"tokenizer_max_length = {max_length}", f"at least {len(template)}, which the template alone takes"
            )
        self._added = {index: str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
        self._template_added = self._count_added(template)

    @property
    def truncated(self) -> tuple[str, ...]:
        """The prompts so far of which a part was left out."""
        return tuple(self._truncated)

    @property
    def control_tokens(self) -> Mapping[str, tuple[str, ...]]:
        """The prompts so far that spell control tokens such as [INST] or <|im_end|>, and which. The tokenizer reads the
        tokens themselves there, not their letters, as the reference does."""
        return self._control_tokens

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, template included, at most `max_length`."""
        return [len(ids) for ids in self._fitted(prompts)]

    def encode(self, prompts: Sequence[str]) -> list[TextContext]:
        """The context of each prompt, computed as one batch."""
        (contexts,) = self.encode_batches([prompts])
        return contexts

    def encode_batches(
        self, batches: Sequence[Sequence[str]], report: ShareDone = lambda _share: None
    ) -> Generator[list[TextContext], None, None]:
        """The contexts of each batch, in order. Batches do not mix: each has the bits that `encode` would give it.

        `report` is told of work that takes long and yields nothing yet.

        Raises:
            DataError: a row is not finite; its layer and its prompt, or padding, are named.
        """
        fitted = [self._fitted(batch) for batch in batches]
        padded = [self._padded(ids) for ids in fitted]
        if self._text.padding_side == "left" and self._pad is None:
            # Before one token that sees itself, so that there is a mask.
            blank = self._padded([self._tokenize([""])[0][:1]])
            found = self._states([blank, *padded], report)
            pad = next(found)[:, :1].clone()
            self._check_finite(pad, ["padding"])
            self._pad = pad[0, 0]
        else:
            found = self._states(padded, report)
        for prompts, batch, states in zip(batches, fitted, found, strict=True):
            self._check_finite(states, [repr(prompt) for prompt in prompts])
            yield [self._context(states[index], len(ids)) for index, ids in enumerate(batch)]

    def _context(self, states: Float[Tensor, "n d"], tokens: int) -> TextContext:
        """The context of one prompt of `tokens` tokens, from its padded rows."""
        if self._pad is None:
            return TextContext.dense(states[None].clone())
        return left_padded(states[len(states) - tokens :], self._pad, self._max_length)

    def _check_finite(self, states: Float[Tensor, "b n d"], of: Sequence[str]) -> None:
        """Raise a DataError if a row of `states` is not finite: padding too. `of` says of what each sample is."""
        for layer, state in zip(self._layers, states.chunk(len(self._layers), dim=-1), strict=True):
            if not torch.isfinite(state).all():
                shown = ", ".join(name for name, own in zip(of, state, strict=True) if not torch.isfinite(own).all())
                raise DataError.of(
                    f"the text encoder gave numbers that are not finite after layer {layer}, for {shown}",
                    remedy="Its weights are damaged, or too large for fp16: download them again, or give "
                    "--mixed_precision=bf16.",
                )

    @abc.abstractmethod
    def _states(self, batches: Sequence[TokenBatch], report: ShareDone, /) -> Iterator[Float[Tensor, "b n d"]]:
        """The states of each batch after the chosen layers, side by side, on the CPU."""

    def _fitted(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids that fit. A prompt that is too long loses its end; the template around it stays whole."""
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
        """How often each token that no text is split into is among `ids`."""
        return Counter(self._added[index] for index in ids if index in self._added)

    def _shortened(self, text: str) -> list[int]:
        def tokens_with(characters: int) -> int:
            return len(self._tokenize([text[:characters]])[0])

        too_many = bisect.bisect_right(range(len(text)), self._max_length, key=tokens_with)
        return self._tokenize([text[: too_many - 1]])[0]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of `texts` in the chat template, with nothing cut and nothing padded."""
        message = self._text.system_message
        system = [] if message is None else [{"role": "system", "content": [{"type": "text", "text": message}]}]
        # Mistral's template takes parts, Qwen's a text. Qwen's prompt ends where an answer without thinking begins.
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
        """`batch` padded on the flavour's side.

        On the left, padding goes one beyond the longest, not to `max_length`: rows of text do not depend on it. One
        beyond, so that every batch has padding and takes the same way through attention. On the right it goes to
        `max_length`: the transformer sees these rows.
        """
        is_left = self._text.padding_side == "left"
        width = min(max(map(len, batch)) + 1, self._max_length) if is_left else self._max_length
        ids: Int64[Tensor, "b n"] = torch.full((len(batch), width), self._tokenizer.pad_token_id)
        seen = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, tokens in enumerate(batch):
            text = slice(width - len(tokens), width) if is_left else slice(len(tokens))
            ids[row, text] = torch.tensor(tokens)
            seen[row, text] = 1
        # Where they would be with all the padding.
        positions = torch.arange(self._max_length - width, self._max_length)[None]
        return TokenBatch(ids, seen, positions)


def control_token_notice(found: Mapping[str, Sequence[str]]) -> str:
    """A warning of prompts that spell control tokens: how many, which, and of what kind."""
    names = sorted({name for tokens in found.values() for name in tokens})
    shown = "; ".join(prompt[:60] + ("…" if len(prompt) > 60 else "") for prompt in list(found)[:3])
    count = "1 caption spells" if len(found) == 1 else f"{len(found)} captions spell"
    return (
        f"{count} control tokens of the text encoder, which reads them as such and not as text: "
        f"{', '.join(names[:6])}{', …' if len(names) > 6 else ''}. Spell them otherwise (with a space inside) unless "
        f"that is meant: {shown}"
    )


class ResidentTextEncoder(TextEncoder):
    """A text encoder that is in memory as a whole.

    `model` is transformers' MistralModel or Qwen3Model, cut after the last of `layers` and without its final norm (with
    it, the last state would be another one). `layers` count from 1.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, text: TextContextSpec, layers: tuple[int, ...], max_length: int
    ) -> None:
        super().__init__(tokenizer, text=text, layers=layers, max_length=max_length)
        self._model = model
        self._kept: dict[int, Tensor] = {}
        for layer in layers:
            model.layers[layer - 1].register_forward_hook(self._keep(layer))

    def _states(self, batches: Sequence[TokenBatch], _report: ShareDone, /) -> Iterator[Float[Tensor, "b n d"]]:
        return map(self._forward, batches)

    @torch.no_grad()
    def _forward(self, batch: TokenBatch) -> Float[Tensor, "b n d"]:
        device = self._model.device
        self._model(
            input_ids=batch.ids.to(device),
            attention_mask=batch.seen.to(device),
            position_ids=batch.positions.to(device),
            use_cache=False,
        )
        states = torch.cat([self._kept[layer] for layer in self._layers], dim=-1).cpu()
        self._kept.clear()
        return states

    def _keep(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            self._kept[layer] = output

        return hook
