"""Batches that are made while the device computes."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from jaxtyping import PyTree

# Batches made before they are asked for.
_PREFETCHED: Final = 2


@contextmanager
def prefetched(batch: Callable[[int], PyTree], start: int, end: int) -> Iterator[Iterator[PyTree]]:
    """Batches ``start`` to ``end``, made in a thread while the device computes."""
    ready: queue.Queue[PyTree] = queue.Queue(_PREFETCHED)
    ended = threading.Event()

    def put(item: PyTree) -> None:
        while not ended.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                break

    def make() -> None:
        for index in range(start, end):
            try:
                put(batch(index))
            except Exception as error:
                put(error)
                break
            if ended.is_set():
                break

    def take() -> Iterator[PyTree]:
        for _ in range(start, end):
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        ended.set()
        thread.join()
