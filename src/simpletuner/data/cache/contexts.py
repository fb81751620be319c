"""The cache of text contexts. What is stored of one is the text encoder's business: its codec packs and unpacks it."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from simpletuner.base.errors import DataError
from simpletuner.base.files import sha256_json
from simpletuner.data.cache.report import FillReport, share_of, whole_progress
from simpletuner.data.cache.store import Store, check_all
from simpletuner.flow.condition import TextContext
from simpletuner.memory.world import World


@runtime_checkable  # the tests check signatures as they run
class ContextCodec(Protocol):
    """How a text encoder's contexts are stored. Needs no encoder: cached contexts are read without one."""

    @property
    def key(self) -> str:
        """Fingerprint of everything that turns text into a context."""
        ...

    @property
    def least_bytes(self) -> int:
        """Bytes that a stored context takes at least."""
        ...

    def pack(self, context: TextContext) -> Mapping[str, Tensor]:
        """The tensors to store of a context of one sample."""
        ...

    def unpack(self, stored: Mapping[str, Tensor]) -> TextContext:
        """The context that `pack` stored, bit for bit."""
        ...


@runtime_checkable
class ContextEncoder(Protocol):
    """A text encoder, as the cache sees it."""

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, without padding."""
        ...

    def encode_batches(
        self, batches: Sequence[Sequence[str]], report: Callable[[float], None]
    ) -> Generator[Sequence[TextContext], None, None]:
        """The contexts of each batch, in order, each of one sample. `report` is called with the share of the work that
        is done, in between, if much of it comes before the first of them."""
        ...


def context_key(prompt: str, codec: ContextCodec) -> str:
    """The cache key of a prompt."""
    return sha256_json({"kind": "context", "version": 1, "prompt": prompt, "encoder": codec.key})


def read_context(store: Store, prompt: str, codec: ContextCodec) -> TextContext:
    """The cached context of a prompt, of one sample, on the CPU.

    Raises:
        DataError: it is not there, or was damaged.
    """
    return codec.unpack(store.read(context_key(prompt, codec)))


def fill_contexts(
    prompts: Sequence[str],
    store: Store,
    codec: ContextCodec,
    load: Callable[[], ContextEncoder],
    *,
    batch_size: int,
    write_batch_size: int,
    verify: bool = False,
    report: Callable[[int, int], None],
    world: World,
) -> FillReport:
    """Make every context that the store lacks. All ranks of `world` call it, and each encodes a share of the batches.

    All prompts, cached or not, are sorted by (tokens, text) and cut into batches; a batch that lacks one is
    made again whole. So a batch depends on the set of prompts only, and the bytes are the same after any
    interruption and with any number of ranks. Rank 0 checks the store and cuts the batches.

    Args:
        prompts: those of rank 0 count.
        load: returns the encoder, the same one if called again; called only on ranks that have a share, and on rank 0
            first, which counts the tokens of every prompt.
        batch_size: prompts encoded at once.
        write_batch_size: files written at once.
        verify: read every file, also those that an earlier check left as they are.
        report: called with (prompts encoded, prompts to encode), of all ranks: `whole_progress`.

    Raises:
        DataError: the encoder gave numbers that are not finite, for a prompt that is named.
        DiskError: no space; where that is known before, nothing is loaded.
    """
    started = time.monotonic()

    def plan() -> tuple[list[list[str]], int, int]:
        """Batches to encode, and how many contexts are sound and damaged."""
        unique = sorted(set(prompts))
        store.sweep()
        states = check_all(((store, context_key(prompt, codec)) for prompt in unique), verify=verify)
        lacking = {prompt for prompt, state in zip(unique, states, strict=True) if state != "sound"}
        batches: list[list[str]] = []
        if lacking:
            what = f"The contexts of {len(lacking):,} captions"
            store.check_room(len(lacking) * codec.least_bytes, what, "cache_dir")
            batches = [b for b in _batches(unique, load(), batch_size) if not lacking.isdisjoint(b)]
        return batches, states.count("sound"), states.count("damaged")

    # Whoever looked later would find what others have written meanwhile, and cut other batches.
    batches, found, damaged = world.from_main("the text contexts to encode", plan)
    total = sum(map(len, batches))
    share = share_of(batches, world)
    if share:
        _encode(share, store, codec, load(), write_batch_size, whole_progress(report, sum(map(len, share)), total))
    if batches:
        world.barrier("the end of encoding text contexts")
    return FillReport(total, found, damaged, time.monotonic() - started)


def _encode(
    batches: Sequence[Sequence[str]],
    store: Store,
    codec: ContextCodec,
    text_encoder: ContextEncoder,
    write_batch_size: int,
    report: Callable[[int], None],
) -> None:
    """Encode `batches` and write their contexts. `report` is called with how many are encoded."""
    total, encoded, told = sum(map(len, batches)), 0, 0
    unwritten: list[tuple[str, TextContext]] = []

    def tell(count: int) -> None:
        nonlocal told
        told = max(told, count)
        report(told)

    def write() -> None:
        for prompt, context in unwritten:
            store.write(context_key(prompt, codec), codec.pack(context), {"kind": "context", "prompt": prompt})
        unwritten.clear()

    def go_on(share: float) -> None:
        # What is finished must not wait in memory for what takes long.
        write()
        tell(min(int(share * total), total - 1))

    tell(0)
    with closing(text_encoder.encode_batches(batches, go_on)) as encoding:
        for batch, contexts in zip(batches, encoding, strict=True):
            for prompt, context in zip(batch, contexts, strict=True):
                if not torch.isfinite(context.rows).all():
                    raise DataError.of(f"the text encoder gave numbers that are not finite for {prompt!r}")
                unwritten.append((prompt, context))
            encoded += len(batch)
            if len(unwritten) >= write_batch_size or encoded == total:
                write()
            tell(encoded)


def _batches(prompts: Sequence[str], text_encoder: ContextEncoder, batch_size: int) -> list[list[str]]:
    lengths = dict(zip(prompts, text_encoder.lengths(prompts), strict=True))
    ordered = sorted(prompts, key=lambda prompt: (lengths[prompt], prompt))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
