"""Items made ahead of their use: in order, bounded, by one thread that ends."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest

from pipeline.errors import RequestError
from trainer.prefetch import ahead


class Source:
    def __init__(self, items: int, error: Exception | None = None) -> None:
        self.items, self.error = items, error
        self.made: list[int] = []
        self.threads: set[int] = set()
        self.closed = False
        self.step = threading.Semaphore(0)
        """Released once an item."""

    def __call__(self) -> Generator[int, None, None]:
        try:
            for number in range(self.items):
                self.threads.add(threading.get_ident())
                self.made.append(number)
                self.step.release()
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


def background() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("items", [0, 1, 7])
def test_items_come_in_order_from_one_thread(items: int, most: int) -> None:
    source = Source(items)
    with ahead(source(), most) as found:
        assert list(found) == list(range(items))
    assert source.closed and not background()
    assert len(source.threads - {threading.get_ident()}) == len(source.threads) == min(1, items)


def test_so_many_are_made_ahead_and_no_more() -> None:
    source = Source(10)
    with ahead(source(), 2) as items:
        for _ in range(2):
            assert source.step.acquire(timeout=10)
        assert source.made == [0, 1]  # before the first is asked for
        assert next(items) == 0
        assert source.step.acquire(timeout=10)
        assert not source.step.acquire(timeout=0.1)
        assert source.made == [0, 1, 2]


def test_an_error_comes_as_it_is_where_its_item_would_have() -> None:
    error = RequestError("no log-probabilities")
    with ahead(Source(3, error)(), 2) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(RequestError) as raised:
            next(items)
    assert raised.value is error
    assert not background()


def test_leaving_early_ends_the_thread_and_closes_the_source() -> None:
    source = Source(1000)
    with pytest.raises(ZeroDivisionError), ahead(source(), 2) as items:
        next(items)
        raise ZeroDivisionError
    assert source.closed and not background()
    assert len(source.made) <= 4
