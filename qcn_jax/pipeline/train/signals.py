"""How training stops early: signals, the agreement of all processes on the step to stop at, and the exit status."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came and everything is saved; the process exits with 128 + signal number."""


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Within the block SIGTERM and SIGINT only set the returned event, so that work can be saved first.

    The second signal acts at once. Outside the main thread, where Python allows no handlers, nothing changes.

    Raises:
      Interrupted: at the end of a block that did not act on a signal, so that none is lost.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {}

    def handle(number: int, _: Any) -> None:
        stop.number = number
        stop.set()
        signal.signal(number, previous[number] or signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if stop.is_set():
        raise Interrupted(128 + stop.number)


def interrupted(number: int, where: str, log: Callable[[str], None]) -> Interrupted:
    """Says `where` signal `number` stopped work that is saved; returns what to raise."""
    log(f"stopped by a signal {where}; saved; the same command resumes")
    return Interrupted(128 + number)


class Agreement:
    """Whether to stop, the same answer at the same step in every process.

    A signal reaches processes at different moments. Each puts its own flag into a small array, whose maximum they
    read one step later, so that no step waits for it.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._pending: jax.Array | None = None
        self.number = signal.SIGTERM
        if jax.process_count() > 1:
            self._mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("devices",))
            whole = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
            self._maximum = jax.jit(jnp.max, out_shardings=whole)

    def stops(self) -> bool:
        """To be called once a step, by every process."""
        self.number = getattr(self._stop, "number", self.number)
        if jax.process_count() == 1:
            return self._stop.is_set()
        place = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec("devices"))
        flag = np.full(1, self._stop.is_set(), np.int32)
        before = self._pending
        self._pending = self._maximum(jax.make_array_from_callback((jax.device_count(),), place, lambda _: flag))
        return before is not None and bool(before)

    def stops_now(self) -> bool:
        """As `stops`, of the signals that have come by now; waits for the other processes."""
        return self.stops() | (jax.process_count() > 1 and self.stops())
