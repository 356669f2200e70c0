"""One pool of threads for work on arrays: numpy releases the interpreter lock in its loops.

The threads stay, and with them the tables that they use again and again: see ``block_search.scratch``.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["in_threads", "thread_count"]

Result = TypeVar("Result")


def thread_count() -> int:
    """How many threads there are."""
    return os.cpu_count() or 1


def in_threads(work: Callable[[int], Result], parts: Iterable[int]) -> Iterator[Result]:
    """Results of parts in order. Work must not ask for threads itself: it would wait for its own."""
    return _pool().map(work, parts)


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(thread_count(), thread_name_prefix="onnxsmith-arrays")


# A forked process has the pool, but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
