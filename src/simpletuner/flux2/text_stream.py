"""A text encoder that keeps one layer in memory: all captions pass through a layer before the next one is read."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from simpletuner.config.flavours import TextContextSpec
from simpletuner.flux2.text import ShareDone, TextEncoder, TokenBatch
from simpletuner.memory.scratch import Scratch

PORTION_TOKENS = 2**17
"""Tokens in one portion: about 1,200 captions of 60 tokens, template included. Each portion reads the weights once. An
interruption loses the work on one portion."""

MEMORY_BYTES = 2 * 2**30
"""Limit for a portion's states in memory. The others, for dev in bf16 at most 1.8 GiB, go to a temporary file."""

Embed = Callable[[Int64[Tensor, "b n"]], Float[Tensor, "b n d"]]


class StreamedTextEncoder(TextEncoder):
    """A text encoder that reads its weights layer by layer.

    Peak memory: on `device` one layer and the activations of one batch; in host memory `memory_bytes` of states and
    twice the context of a batch.

    Args:
        embed: returns the embeddings of token ids, and reads only these rows.
        read_layer: returns a layer by its number from 0, on `device`, as a transformers model that has only this
            layer, without embedding and final norm. Masks and positions are computed by the same code as in the whole
            model, so the bits are equal.
        width: number of features of a state.
        dtype: dtype of states and weights.
        folder: for the temporary file of states that exceed `memory_bytes`.
        portion_tokens: limit for the tokens of one portion, padding included; a portion has at least one batch.
        memory_bytes: limit for a portion's states in memory.

    Raises:
        DiskError: `folder` has no space for the states.
    """

    def __init__(
        self,
        embed: Embed,
        read_layer: Callable[[int], Any],
        tokenizer: Any,
        text: TextContextSpec,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        folder: Path,
        portion_tokens: int = PORTION_TOKENS,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        super().__init__(tokenizer, text)
        self._embed = embed
        self._read_layer = read_layer
        self._width = width
        self._dtype = dtype
        self._device = device
        self._folder = folder
        self._portion_tokens = portion_tokens
        self._memory_bytes = memory_bytes

    def _states(self, batches: Sequence[TokenBatch], report: ShareDone, /) -> Iterator[Float[Tensor, "b n d"]]:
        work = sum(batch.tokens for batch in batches) * max(self._layers)
        done = 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            report(done / work)

        for portion in portions(batches, self._portion_tokens):
            yield from self._states_of(portion, advance)

    def _states_of(
        self, portion: Sequence[TokenBatch], advance: Callable[[int], None]
    ) -> Iterator[Float[Tensor, "b n d"]]:
        # The first slots hold the residual stream; they get memory first, because every layer reads and writes them. At
        # the end they hold the output of the last layer.
        count, earlier_layers = len(portion), self._layers[:-1]
        shapes = [(*batch.ids.shape, self._width) for batch in portion] * (1 + len(earlier_layers))
        scratch = Scratch(shapes, dtype=self._dtype, memory_bytes=self._memory_bytes, folder=self._folder)
        with scratch:
            for slot, batch in enumerate(portion):
                scratch.put(slot, self._embed(batch.ids))
            for index in range(self._layers[-1]):
                layer = self._read_layer(index)
                for slot, batch in enumerate(portion):
                    state = self._through(layer, scratch.get(slot), batch)
                    scratch.put(slot, state)
                    if index + 1 in earlier_layers:
                        scratch.put(count * (1 + earlier_layers.index(index + 1)) + slot, state)
                    advance(batch.tokens)
                # Free the layer before the next one is read.
                del layer
            for slot in range(count):
                stacked = [scratch.get(count * number + slot) for number in range(1, 1 + len(earlier_layers))]
                yield torch.cat([*stacked, scratch.get(slot)], dim=-1)

    @torch.no_grad()
    def _through(self, layer: Any, stream: Float[Tensor, "b n d"], batch: TokenBatch) -> Float[Tensor, "b n d"]:
        output = layer(
            inputs_embeds=stream.to(self._device),
            attention_mask=batch.attention_mask.to(self._device),
            position_ids=batch.positions.to(self._device),
            use_cache=False,
        )
        state: Tensor = output.last_hidden_state.cpu()
        return state


def portions(batches: Sequence[TokenBatch], tokens: int) -> Iterator[list[TokenBatch]]:
    """Group `batches`, in order, into portions of at most `tokens` tokens. A larger batch is a portion of its own."""
    portion: list[TokenBatch] = []
    for batch in batches:
        if portion and sum(before.tokens for before in portion) + batch.tokens > tokens:
            yield portion
            portion = []
        portion.append(batch)
    if portion:
        yield portion
