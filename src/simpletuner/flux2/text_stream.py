"""The text encoder with one layer in memory: every caption goes through a layer before the next one is read."""

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
"""Tokens that go through the layers together, about 1,200 captions of 60 tokens with their template. An interruption
loses the work on one portion; each portion reads the weights once."""

MEMORY_BYTES = 2 * 2**30
"""What a portion's states may take in memory. The others, for dev in bf16 at most 1.8 GiB, are in a file meanwhile."""

Embed = Callable[[Int64[Tensor, "b n"]], Float[Tensor, "b n d"]]


class StreamedTextEncoder(TextEncoder):
    """A text encoder that is read layer by layer.

    What it takes at its peak: one layer and the activations of one batch on `device`; `memory_bytes` of states in
    memory, and twice a batch's context.

    Args:
        embed: rows of the embedding, of which only those are read.
        read_layer: the layer of that number, from 0, on `device`: transformers' model of this one layer, without
            embedding and final norm. So masks and positions are made, and the layer is run, by the very code that
            runs the whole model, and the bits are the same.
        layers: after which states are kept, counted from 1.
        width: of a state.
        dtype: of states and weights.
        folder: where states go that do not stay in memory.
        portion_tokens: tokens, padding included, that go through the layers together; at least one batch does.
        memory_bytes: what their states may take in memory.

    Raises:
        DiskError: no space for the states in `folder`.
    """

    def __init__(
        self,
        embed: Embed,
        read_layer: Callable[[int], Any],
        tokenizer: Any,
        *,
        text: TextContextSpec,
        layers: tuple[int, ...],
        max_length: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        folder: Path,
        portion_tokens: int = PORTION_TOKENS,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        super().__init__(tokenizer, text=text, layers=layers, max_length=max_length)
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
        # The last of the kept states are the stream itself at its end. The stream comes first: it is what every layer
        # reads and writes, so it has the first claim on memory.
        count, kept = len(portion), self._layers[:-1]
        shapes = [(*batch.ids.shape, self._width) for batch in portion] * (1 + len(kept))
        scratch = Scratch(shapes, dtype=self._dtype, memory_bytes=self._memory_bytes, folder=self._folder)
        with scratch:
            for place, batch in enumerate(portion):
                scratch.put(place, self._embed(batch.ids))
            for index in range(self._layers[-1]):
                layer = self._read_layer(index)
                for place, batch in enumerate(portion):
                    state = self._through(layer, scratch.get(place), batch)
                    scratch.put(place, state)
                    if index + 1 in kept:
                        scratch.put(count * (1 + kept.index(index + 1)) + place, state)
                    advance(batch.tokens)
                # Before the next one is read, so that there is one at a time.
                del layer
            for place in range(count):
                stacked = [scratch.get(count * number + place) for number in range(1, 1 + len(kept))]
                yield torch.cat([*stacked, scratch.get(place)], dim=-1)

    @torch.no_grad()
    def _through(self, layer: Any, stream: Float[Tensor, "b n d"], batch: TokenBatch) -> Float[Tensor, "b n d"]:
        output = layer(
            inputs_embeds=stream.to(self._device),
            attention_mask=batch.seen.to(self._device),
            position_ids=batch.positions.to(self._device),
            use_cache=False,
        )
        state: Tensor = output.last_hidden_state.cpu()
        return state


def portions(batches: Sequence[TokenBatch], tokens: int) -> Iterator[list[TokenBatch]]:
    """`batches` in their order, cut so that none has more than `tokens` of them, unless a single batch does."""
    portion: list[TokenBatch] = []
    for batch in batches:
        if portion and sum(before.tokens for before in portion) + batch.tokens > tokens:
            yield portion
            portion = []
        portion.append(batch)
    if portion:
        yield portion
