"""What is computed once, however many threads ask for it."""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Once:
    """Computes the value of a key once, however many threads ask for it at the same time.

    A value that `keep` refuses is given to those who wait for it, and computed again for the next. The oldest values
    are forgotten where there are more than `limit`.
    """

    def __init__(self, keep: Callable[[Any], bool] = lambda value: True, limit: int = 4096) -> None:
        self._keep, self._limit = keep, limit
        self._lock = threading.Lock()
        self._values: dict[Any, concurrent.futures.Future[Any]] = {}
        self.asked = self.computed = 0

    def get(self, key: Any, compute: Callable[[], T]) -> T:
        """The value of `key`; `compute()` if nobody has, or is about to have, it."""
        with self._lock:
            self.asked += 1
            future = self._values.get(key)
            mine = future is None
            if future is None:
                self.computed += 1
                future = self._values[key] = concurrent.futures.Future()
                if len(self._values) > self._limit:
                    del self._values[next(iter(self._values))]  # whoever waits for it holds the future itself
        if mine:
            try:
                value = compute()
            except BaseException as error:
                self._forget(key, future)
                future.set_exception(error)
                raise
            if not self._keep(value):
                self._forget(key, future)
            future.set_result(value)
        return future.result()

    def _forget(self, key: Any, future: concurrent.futures.Future[Any]) -> None:
        with self._lock:
            if self._values.get(key) is future:
                del self._values[key]
