"""Seconds and peak memory of a block, for benchmarks that set two interpreters side by side; standard library alone."""

import pathlib
import re
import threading
import time

_STATUS = pathlib.Path("/proc/self/status")
_EVERY = 0.01  # seconds between two looks at the memory


class Measured:
    """Measures a with-block.

    Attributes:
      result: `wall` and `cpu` seconds, and `bytes`, by how much the memory of the process has grown at most. Pages of
        mapped files are not counted: the system takes them back when it needs them.
    """

    def __enter__(self):
        self._peak = self._before = _anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._over.set()
        self._thread.join()
        self.result = {"wall": wall, "cpu": cpu, "bytes": max(self._peak, _anonymous()) - self._before}

    def _watch(self):
        while not self._over.wait(_EVERY):
            self._peak = max(self._peak, _anonymous())


def _anonymous():
    return 1024 * int(re.search(r"RssAnon:\s*(\d+)", _STATUS.read_text())[1])
