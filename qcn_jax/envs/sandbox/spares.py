"""Started servers that wait for use, so that a sandbox in a container of its own need not wait for it to start."""

import collections
import threading
from collections.abc import Callable
from typing import Any

from qcn_jax.envs.sandbox import channel
from qcn_jax.envs.sandbox.channel import SandboxError


class Spares:
    """Keeps `count` spare servers of what was asked for last.

    Args:
      start: makes a server for a prepared repository, its tree loaded; runs in a thread of this object.
      count: how many wait at most.
    """

    def __init__(self, start: Callable[[Any], channel.Server], count: int):
        self._start, self._count = start, count
        self._changed = threading.Condition()
        self._ready: collections.deque[tuple[str, channel.Server]] = collections.deque()
        self._wanted: Any = None  # the prepared repository that spares are made for
        self._closing = False
        # One thread for the whole life: servers end with the thread that started them.
        self._thread = threading.Thread(target=self._fill, daemon=True, name="sandbox-spares")
        self._thread.start()

    def take(self, prepared: Any) -> channel.Server | None:
        """A spare server for `prepared`, or None where none is ready; more are then made for it."""
        with self._changed:
            self._wanted = prepared
            stale = [server for key, server in self._ready if key != prepared.key or not server.alive()]
            ready = [entry for entry in self._ready if entry[1] not in stale]
            taken = ready.pop(0)[1] if ready else None
            self._ready = collections.deque(ready)
            self._changed.notify_all()
        for server in stale:
            server.close()
        return taken

    def waiting(self) -> int:
        """How many are ready."""
        with self._changed:
            return len(self._ready)

    def _fill(self) -> None:
        while True:
            with self._changed:
                while not self._closing and (self._wanted is None or len(self._ready) >= self._count):
                    self._changed.wait()
                if self._closing:
                    return
                wanted = self._wanted
            try:
                server = self._start(wanted)
            except (SandboxError, OSError):
                with self._changed:
                    self._wanted = None  # whoever asks next starts its own and is told why, if it fails again
                continue
            with self._changed:
                keep = not self._closing
                if keep:
                    self._ready.append((wanted.key, server))
                    self._changed.notify_all()
            if not keep:
                server.close()

    def close(self) -> None:
        """Ends the spares; servers that were taken are not touched."""
        with self._changed:
            self._closing = True
            ready, self._ready = list(self._ready), collections.deque()
            self._changed.notify_all()
        for _, server in ready:
            server.close()
        self._thread.join()
