"""Prefetching map: threads compute a bounded number of results before the caller asks for them."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetched_map(work: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int) -> Generator[R]:
    """Yield `work(item)` for each item, in the items' order, with at most `ahead` results started and not yet yielded.

    An exception in `work` is raised in place of its result. The pending work is then canceled, as it is when the caller
    stops early.
    """
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                if len(pending) >= ahead:
                    yield pending.popleft().result()
                pending.append(pool.submit(work, item))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
