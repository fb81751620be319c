"""Work in threads, a bounded distance ahead of whoever takes the results."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(work: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int) -> Generator[R]:
    """`work(item)` for each item, in the items' order, with at most `ahead` results started and not yet
    taken.

    What `work` raises is raised where its result would have come; the rest is then cancelled, as it is when
    the caller stops early.
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
