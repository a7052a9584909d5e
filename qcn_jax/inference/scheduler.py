"""Continuous batching: requests come and go while the engine decodes, a few tokens at a time for all of them."""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from qcn_jax.inference.engine import Engine
from qcn_jax.inference.sampling import History, Sampling

PIECE = 8  # tokens between two looks at who came and who went


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some tokens of a request; `finish` is None while more may come, else stop, length or "error: ...".

    `alternatives`: see engine.Generation.
    """

    tokens: list[int]
    logprobs: list[float]
    finish: str | None
    alternatives: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)


class Request:
    """One sequence to be continued.

    Args:
      tokens: the prompt.
      sampling: how to draw.
      max_new_tokens: at most this many.
      seed: of the random stream.
      emit: called from the scheduler's thread with every Piece; must not block.
    """

    def __init__(
        self, tokens: Sequence[int], sampling: Sampling, max_new_tokens: int, seed: int, emit: Callable[[Piece], None]
    ) -> None:
        self.tokens, self.sampling, self.seed, self.emit = list(tokens), sampling, seed, emit
        self.left = max_new_tokens
        self.made: list[int] = []
        self.cancelled = False

    def cancel(self) -> None:
        """Nobody waits for the rest; its slot is freed before the next piece."""
        self.cancelled = True


class Scheduler:
    """Owns an engine and serves requests with it from a thread of its own."""

    def __init__(self, engine: Engine, most_waiting: int = 256) -> None:
        """Starts the thread; `most_waiting` requests may wait for a slot."""
        self.engine, self._most_waiting = engine, most_waiting
        self._waiting: deque[Request] = deque()
        self._active: dict[int, Request] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> bool:
        """Queues requests, all or none; False where too many wait already.

        Raises:
          ValueError: a prompt that is empty or leaves no room in a slot, or a request for less than one token.
        """
        for request in requests:
            if not 0 < len(request.tokens) < self.engine.max_length:
                most = self.engine.max_length - 1
                raise ValueError(f"the prompt has {len(request.tokens)} tokens; allowed: 1 to {most}")
            if request.left < 1:
                raise ValueError(f"max_new_tokens: {request.left}, must be at least 1")
        with self._changed:
            if self._closed or len(self._waiting) + len(requests) > self._most_waiting:
                return False
            self._waiting.extend(requests)
            self._changed.notify()
        return True

    def load(self) -> tuple[int, int]:
        """How many requests (are being served, wait)."""
        with self._changed:
            return len(self._active), len(self._waiting)

    def close(self) -> None:
        """Ends the thread; whoever still waits gets an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._active or self._waiting)
                if self._closed:
                    break
                admitted = self._admit()
            try:
                self._step(admitted)
            except Exception:  # the server must outlive whatever the accelerator throws
                self._one_by_one()
        self._fail("the server is shutting down")

    def _admit(self) -> dict[int, Request]:
        """Gives free slots to those who wait, dropping those who left."""
        for slot in [slot for slot, request in self._active.items() if request.cancelled]:
            del self._active[slot]
        self._waiting = deque(request for request in self._waiting if not request.cancelled)
        admitted = {}
        for slot in range(self.engine.slots):
            if self._waiting and slot not in self._active:
                admitted[slot] = self._active[slot] = self._waiting.popleft()
        return admitted

    def _step(self, admitted: dict[int, Request]) -> None:
        if admitted:
            self.engine.reset(list(admitted))
            self._prefill(admitted)
        if self._active:
            self._generate(sorted(self._active))

    def _generate(self, slots: list[int]) -> None:
        """One piece for each of `slots`."""
        chosen = [self._active[slot] for slot in slots]
        generations = self.engine.generate(
            slots, seeds=[request.seed for request in chosen], sampling=[request.sampling for request in chosen],
            max_new_tokens=[min(PIECE, request.left) for request in chosen],
            histories=[History(request.tokens, request.made) for request in chosen]
            if any(request.sampling.adjusts for request in chosen) else None,
        )  # fmt: skip
        for slot, request, generation in zip(slots, chosen, generations, strict=True):
            request.left -= len(generation.tokens)
            request.made += generation.tokens
            full = self.engine.length(slot) >= self.engine.max_length
            finish = "stop" if generation.finish == "stop" else "length" if full or request.left <= 0 else None
            if finish is not None:
                with self._changed:
                    del self._active[slot]
            request.emit(Piece(generation.tokens, generation.logprobs.tolist(), finish, generation.alternatives))

    def _prefill(self, admitted: dict[int, Request]) -> None:
        """One prefill for each distinct sequence and part of the engine, copied to all requests that have the same."""
        first: dict[tuple[Any, ...], int] = {}
        copies: dict[int, list[int]] = {}
        for slot, request in admitted.items():
            origin = first.setdefault((self.engine.part(slot), *request.tokens, *request.made), slot)
            if origin != slot:
                copies.setdefault(origin, []).append(slot)
        self.engine.extend({slot: [*admitted[slot].tokens, *admitted[slot].made] for slot in first.values()})
        if copies:
            self.engine.fork(copies)

    def _one_by_one(self) -> None:
        """Serves each request alone after a failure, so that it ends only those with which the engine fails.

        The caches may be torn, so everyone is prefilled again: streams count positions, nothing is drawn twice.
        """
        for slot, request in sorted(self._active.items()):
            try:
                self.engine.clear()
                self._prefill({slot: request})
                self._generate([slot])
            except Exception as error:
                with self._changed:
                    self._active.pop(slot, None)
                request.emit(Piece([], [], f"error: the engine failed: {error}"))
        try:
            self.engine.clear()
            if self._active:
                self._prefill(self._active)
        except Exception as error:
            self._fail(f"the engine failed: {error}")

    def _fail(self, reason: str) -> None:
        with self._changed:
            lost = [*self._active.values(), *(self._waiting if self._closed else ())]
            self._active.clear()
            if self._closed:
                self._waiting.clear()
        for request in lost:
            request.emit(Piece([], [], f"error: {reason}"))
