"""Prompts to context: the residual stream of a language model after three of its layers, side by side."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from simpletuner.base.errors import AccessError, ConfigError
from simpletuner.flux2.spec import SYSTEM_MESSAGE


@dataclass(frozen=True)
class EncodedText:
    """The context of one prompt without its repetitions: `length - n` times `pad`, then `rows`."""

    rows: Float[Tensor, "n d"]
    """Of the prompt's tokens, template included."""
    pad: Float[Tensor, " d"]
    """Of every padding token: they attend to nothing, so they are all alike."""
    length: int

    def full(self) -> Float[Tensor, "l d"]:
        """What the transformer is given."""
        padding = self.pad.expand(self.length - len(self.rows), -1)
        return torch.cat([padding, self.rows])


class TextEncoder:
    """Embeds prompts with the language part of Mistral-3, as the reference does.

    `model` is transformers' MistralModel, cut after the last of `layers` and without its final norm (with it, the last
    state would be another one). `layers` count from 1. Contexts come in the model's own type, on the CPU.

    Raises:
        ConfigError: `max_length` leaves no room for the template.
        AccessError: the tokenizer has no chat template or no padding token.
    """

    def __init__(self, model: Any, tokenizer: Any, *, layers: tuple[int, ...], max_length: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._layers = layers
        self._max_length = max_length
        self._truncated: dict[str, None] = {}
        if tokenizer.chat_template is None or tokenizer.pad_token_id is None:
            raise AccessError.of(
                f"{tokenizer.name_or_path} has no {'padding token' if tokenizer.chat_template else 'chat template'}",
                remedy="Use the tokenizer folder that comes with FLUX.2-dev.",
            )
        template = len(self._tokenize([""])[0])
        if template > max_length:
            raise ConfigError.of(
                f"tokenizer_max_length = {max_length}", f"at least {template}, which the template alone takes"
            )
        self._states: dict[int, Tensor] = {}
        for layer in layers:
            model.layers[layer - 1].register_forward_hook(self._keep(layer))
        # Behind one token that sees itself, so that the mask is a real one: a row that sees nothing attends to
        # nothing under SDPA (under other implementations, to everything).
        self._pad: Tensor = self._forward([self._tokenize([""])[0][:1]])[0, 0].clone()

    @property
    def truncated(self) -> tuple[str, ...]:
        """The prompts so far of which a part was left out."""
        return tuple(self._truncated)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, template included, at most `max_length`."""
        return [len(ids) for ids in self._fitted(prompts)]

    def encode(self, prompts: Sequence[str]) -> list[EncodedText]:
        """The context of each prompt, computed as one batch."""
        fitted = self._fitted(prompts)
        states = self._forward(fitted)
        return [
            EncodedText(states[index, states.shape[1] - len(ids) :].clone(), self._pad, self._max_length)
            for index, ids in enumerate(fitted)
        ]

    def _fitted(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids that fit. A prompt that is too long loses its end; the template around it stays whole."""
        # Image tokens would be counted against pictures that are not there.
        texts = [prompt.replace("[IMG]", "") for prompt in prompts]
        fitted = self._tokenize(texts)
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if len(fitted[index]) > self._max_length:
                self._truncated[prompt] = None
                fitted[index] = self._shortened(text)
        return fitted

    def _shortened(self, text: str) -> list[int]:
        def tokens_with(characters: int) -> int:
            return len(self._tokenize([text[:characters]])[0])

        too_many = bisect.bisect_right(range(len(text)), self._max_length, key=tokens_with)
        return self._tokenize([text[: too_many - 1]])[0]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of `texts` in the chat template, with nothing cut and nothing padded."""
        chats = [
            [
                {"role": "system", "content": [{"type": "text", "text": SYSTEM_MESSAGE}]},
                {"role": "user", "content": [{"type": "text", "text": text}]},
            ]
            for text in texts
        ]
        encoded = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=False, tokenize=True, return_dict=True, padding=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    @torch.no_grad()
    def _forward(self, batch: Sequence[Sequence[int]]) -> Float[Tensor, "b n d"]:
        """States of left-padded `batch`. Padding goes one beyond the longest, not to `max_length`: rows of text do not
        depend on it. One beyond, so that every batch has padding and takes the same way through attention."""
        width = min(max(map(len, batch)) + 1, self._max_length)
        ids: Int64[Tensor, "b n"] = torch.full((len(batch), width), self._tokenizer.pad_token_id)
        seen = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, tokens in enumerate(batch):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            seen[row, width - len(tokens) :] = 1
        # Where they would be with all the padding.
        positions = torch.arange(self._max_length - width, self._max_length)[None]
        device = self._model.device
        self._model(
            input_ids=ids.to(device),
            attention_mask=seen.to(device),
            position_ids=positions.to(device),
            use_cache=False,
        )
        states = torch.cat([self._states[layer] for layer in self._layers], dim=-1).cpu()
        self._states.clear()
        return states

    def _keep(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            self._states[layer] = output

        return hook
