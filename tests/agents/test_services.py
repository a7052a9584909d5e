"""Equal work is done once, however many threads ask for it."""

import concurrent.futures
import threading
import time

import pytest

from qcn_jax.agents.services import Once


def test_once() -> None:
    once, started = Once(keep=lambda value: value >= 0), threading.Event()

    def slow():
        started.set()
        time.sleep(0.05)
        return 5

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda _: once.get("key", slow), range(8))) == [5] * 8
    assert once.computed == 1 and once.get("key", lambda: 6) == 5
    assert once.get("bad", lambda: -1) == -1 and once.get("bad", lambda: 3) == 3

    def fails():
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError):
            once.get("error", fails)
    assert once.get("error", lambda: 1) == 1
    small = Once(limit=2)
    assert [small.get(n, lambda n=n: n) for n in (1, 2, 3, 3, 1)] == [1, 2, 3, 3, 1] and small.computed == 4
