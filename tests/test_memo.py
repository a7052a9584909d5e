"""What is computed once."""

import concurrent.futures
import threading

import pytest

from qcn_jax.memo import Once


def test_threads_that_ask_at_the_same_time_share_one_computation():
    once, started, go = Once(), threading.Event(), threading.Event()
    calls = []

    def compute():
        calls.append(None)
        started.set()
        assert go.wait(60)
        return len(calls)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        first = threads.submit(once.get, "key", compute)
        assert started.wait(60)
        others = [threads.submit(once.get, "key", compute) for _ in range(3)]
        go.set()
        assert [future.result() for future in (first, *others)] == [1] * 4
    assert (once.asked, once.computed) == (4, 1)


def test_what_is_not_kept_or_failed_is_computed_again():
    once, values = Once(keep=lambda value: value > 1), iter([1, 2, 3])
    assert [once.get("key", lambda: next(values)) for _ in range(3)] == [1, 2, 2]
    with pytest.raises(ZeroDivisionError):
        once.get("other", lambda: 1 // 0)
    assert once.get("other", lambda: 7) == 7


def test_the_oldest_is_forgotten():
    once = Once(limit=2)
    assert [once.get(key, lambda: key) for key in (1, 2, 3)] == [1, 2, 3]
    assert once.get(3, lambda: "again") == 3 and once.get(1, lambda: "again") == "again"
