"""What comes next is made while this is used: by one thread, in order, a bounded number ahead."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
_END: Any = object()


@contextlib.contextmanager
def ahead(source: Generator[Item, None, None], most: int) -> Iterator[Iterator[Item]]:
    """The items of `source`, of which up to `most` are made in a background thread before they are asked for.

    All of `source` runs in that thread, so what it uses needs no lock. What it raises is raised where the item would
    have come. Leaving the block ends the thread and closes `source`, whatever is left of it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        waiting = deque(thread.submit(next, source, _END) for _ in range(most))

        def items() -> Iterator[Item]:
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(thread.submit(next, source, _END))
                yield item

        try:
            yield items()
        finally:
            thread.shutdown(cancel_futures=True)
            source.close()
