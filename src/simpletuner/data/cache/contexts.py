"""The cache of text contexts. The text encoder's codec defines the stored form: it packs and unpacks contexts."""

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
    """Stored form of a text encoder's contexts. It needs no encoder, so cached contexts are read without one."""

    @property
    def key(self) -> str:
        """Fingerprint of everything that determines the context of a text."""
        ...

    @property
    def min_bytes(self) -> int:
        """Minimum size of a stored context in bytes."""
        ...

    def pack(self, context: TextContext) -> Mapping[str, Tensor]:
        """The tensors to store for the context of one sample."""
        ...

    def unpack(self, stored: Mapping[str, Tensor]) -> TextContext:
        """The context from which `pack` made `stored`, bit for bit."""
        ...


@runtime_checkable
class ContextEncoder(Protocol):
    """The interface of a text encoder that the cache uses."""

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Number of tokens of each prompt, without padding."""
        ...

    def encode_batches(
        self, batches: Sequence[Sequence[str]], report: Callable[[float], None]
    ) -> Generator[Sequence[TextContext], None, None]:
        """Yield the contexts of each batch in order, one context per sample. If much work precedes the first batch,
        `report` is called meanwhile with the finished share of the work."""
        ...


def context_key(prompt: str, codec: ContextCodec) -> str:
    """The cache key of a prompt."""
    return sha256_json({"kind": "context", "version": 1, "prompt": prompt, "encoder": codec.key})


def read_context(store: Store, prompt: str, codec: ContextCodec) -> TextContext:
    """Read the cached context of one prompt, on the CPU.

    Raises:
        DataError: the cache file is missing or damaged.
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
    """Encode every context that the store lacks. All ranks of `world` call it, and each encodes a share of the batches.

    All prompts, cached or not, are sorted by (tokens, text) and cut into batches; a batch with a missing context is
    encoded again as a whole. A batch therefore depends only on the set of all prompts, and its bytes are the same after
    any interruption and with any number of ranks. Rank 0 checks the store and cuts the batches.

    Args:
        prompts: only those of rank 0 are used.
        load: returns the encoder, the same one in every call. Called on rank 0 first, which counts the tokens of every
            prompt, then on ranks that have a share.
        batch_size: prompts encoded at once.
        write_batch_size: files written at once.
        verify: read every file, also those that an earlier check verified.
        report: called with (prompts encoded, prompts to encode) over all ranks, as estimated by `whole_progress`.

    Raises:
        DataError: the encoder returned numbers that are not finite; the message names the prompt.
        DiskError: no space; if that is known beforehand, nothing is loaded.
    """
    started = time.monotonic()

    def plan() -> tuple[list[list[str]], int, int]:
        """Batches to encode, and the numbers of sound and damaged contexts."""
        unique = sorted(set(prompts))
        store.sweep()
        states = check_all(((store, context_key(prompt, codec)) for prompt in unique), verify=verify)
        missing = {prompt for prompt, state in zip(unique, states, strict=True) if state != "sound"}
        batches: list[list[str]] = []
        if missing:
            what = f"The contexts of {len(missing):,} captions"
            store.check_room(len(missing) * codec.min_bytes, what, "cache_dir")
            batches = [b for b in _batches(unique, load(), batch_size) if not missing.isdisjoint(b)]
        return batches, states.count("sound"), states.count("damaged")

    # Only rank 0 checks: a rank that checks later would find files of faster ranks, and cut other batches.
    batches, sound, damaged = world.run_on_main("the text contexts to encode", plan)
    total = sum(map(len, batches))
    share = share_of(batches, world)
    if share:
        _encode(share, store, codec, load(), write_batch_size, whole_progress(report, sum(map(len, share)), total))
    if batches:
        world.barrier("the end of encoding text contexts")
    return FillReport(total, sound, damaged, time.monotonic() - started)


def _encode(
    batches: Sequence[Sequence[str]],
    store: Store,
    codec: ContextCodec,
    text_encoder: ContextEncoder,
    write_batch_size: int,
    report: Callable[[int], None],
) -> None:
    """Encode `batches` and write their contexts. `report` is called with the number of encoded prompts."""
    total, encoded, reported = sum(map(len, batches)), 0, 0
    unwritten: list[tuple[str, TextContext]] = []

    def report_increase(count: int) -> None:
        nonlocal reported
        reported = max(reported, count)
        report(reported)

    def write() -> None:
        for prompt, context in unwritten:
            store.write(context_key(prompt, codec), codec.pack(context), {"kind": "context", "prompt": prompt})
        unwritten.clear()

    def report_share(share: float) -> None:
        # Write finished contexts now, so that they do not stay in memory during long work.
        write()
        report_increase(min(int(share * total), total - 1))

    report_increase(0)
    with closing(text_encoder.encode_batches(batches, report_share)) as encoding:
        for batch, contexts in zip(batches, encoding, strict=True):
            for prompt, context in zip(batch, contexts, strict=True):
                if not torch.isfinite(context.rows).all():
                    raise DataError.of(f"the text encoder returned numbers that are not finite for {prompt!r}")
                unwritten.append((prompt, context))
            encoded += len(batch)
            if len(unwritten) >= write_batch_size or encoded == total:
                write()
            report_increase(encoded)


def _batches(prompts: Sequence[str], text_encoder: ContextEncoder, batch_size: int) -> list[list[str]]:
    lengths = dict(zip(prompts, text_encoder.lengths(prompts), strict=True))
    ordered = sorted(prompts, key=lambda prompt: (lengths[prompt], prompt))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
