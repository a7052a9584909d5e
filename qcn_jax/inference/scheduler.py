"""Continuous batching: requests come and go while the engine decodes, a few tokens at a time for all of them.

A slot keeps what it holds when its request has ended. A prompt that begins with what some slot holds takes it up from
there (see prefixes): the next turn of a conversation, another sample, a conversation under the same instructions.
"""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qcn_jax.inference.engine import Engine
from qcn_jax.inference.prefixes import LEAST, Hit, Prefixes
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

    Attributes:
      reused: tokens of the prompt that a slot held already, once it has been admitted.
      routes: `Engine.routes` of all its tokens, once it has ended, of an engine that keeps them.
    """

    def __init__(
        self, tokens: Sequence[int], sampling: Sampling, max_new_tokens: int, seed: int, emit: Callable[[Piece], None]
    ) -> None:
        self.tokens, self.sampling, self.seed, self.emit = list(tokens), sampling, seed, emit
        self.left = max_new_tokens
        self.made: list[int] = []
        self.cancelled = False
        self.reused = 0
        self.routes: np.ndarray | None = None

    @property
    def held(self) -> list[int]:
        """All its tokens so far."""
        return self.tokens + self.made

    def cancel(self) -> None:
        """Nobody waits for the rest; its slot is freed before the next piece."""
        self.cancelled = True


class Scheduler:
    """Owns an engine and serves requests with it from a thread of its own."""

    def __init__(self, engine: Engine, most_waiting: int = 256, least: int = LEAST) -> None:
        """Starts the thread; `most_waiting` requests may wait for a slot; `least`: see prefixes.LEAST."""
        self.engine, self._most_waiting = engine, most_waiting
        self._waiting: deque[Request] = deque()
        self._active: dict[int, Request] = {}
        self._prefixes = Prefixes(engine.slots, engine.parts, engine.snapshots, least)
        self.prefilled = self.reused = 0  # tokens of prompts, since the start
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

    @property
    def alive(self) -> bool:
        """Whether anybody still serves requests."""
        return self._thread.is_alive()

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

    def _admit(self) -> list["_Placed"]:
        """Drops those who left, and gives free slots to those who wait."""
        for slot in [slot for slot, request in self._active.items() if request.cancelled]:
            self._prefixes.extended(slot, self._active.pop(slot).held)
        self._waiting = deque(request for request in self._waiting if not request.cancelled)
        placed: list[_Placed] = []
        while self._waiting and self._has_room(len(self._waiting[0].held)):
            placed.append(self._place(self._waiting.popleft(), placed))
        return placed

    def _has_room(self, tokens: int) -> bool:
        """Whether a request with so many tokens, and all that are active, can generate together."""
        engine = self.engine
        if len(self._active) == engine.slots:
            return False
        held = [len(request.held) for request in self._active.values()]
        return not held or engine.has_room([*held, tokens], PIECE)

    def _step(self, admitted: list["_Placed"]) -> None:
        if admitted:
            self._prefill(admitted)
        if self._active:  # those that came first, where the budget of blocks does not do for all
            self._generate(sorted(self.engine.fitting(list(self._active), PIECE)))

    def _place(self, request: Request, before: Sequence["_Placed"]) -> "_Placed":
        """Gives a request a slot; of those with the same tokens one is prefilled, and others of its part copy it."""
        part, tokens = self.engine.part, request.held
        free = [slot for slot in range(self.engine.slots) if slot not in self._active]
        alike = (one.slot for one in before if one.twin is None and one.request.held == tokens)
        pairs = ((origin, slot) for origin in alike for slot in free if part(slot) == part(origin))
        twin, slot = next(pairs, (None, -1))
        hit = None
        if twin is None:
            slot, hit = self._prefixes.find(tokens, free)
        self._prefixes.take(slot, tokens, hit)
        self._active[slot] = request
        request.reused = len(tokens) if twin is not None else hit.length if hit else 0
        return _Placed(slot, request, hit, twin)

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
                self._prefixes.extended(slot, request.held)
                request.routes = self.engine.routes(slot) if self.engine.with_routes else None
                with self._changed:
                    del self._active[slot]
            request.emit(Piece(generation.tokens, generation.logprobs.tolist(), finish, generation.alternatives))

    def _prefill(self, placed: list["_Placed"]) -> None:
        """Brings the slots to the ends of their requests' tokens; saves their states there, and where prompts part."""
        engine = self.engine
        own = [one for one in placed if one.twin is None]
        taken = [one for one in own if one.hit is not None and one.hit.length]
        copies: dict[int, list[int]] = {}
        for one in taken:
            if one.hit.source != one.slot:
                copies.setdefault(one.hit.source, []).append(one.slot)
        if copies:
            engine.fork(copies)
        engine.reset([one.slot for one in own if one not in taken])  # one of them may have been copied
        engine.restore({one.slot: one.hit.entry for one in taken if one.hit.entry is not None})
        begun = {one.slot: one.hit.length if one.hit else 0 for one in own}
        for parted in (True, False):
            ends = {one.slot: one.hit.parted if parted else len(one.request.held)
                    for one in own if not parted or (one.hit and one.hit.parted)}
            by_slot = {one.slot: one.request.held for one in own}
            engine.extend({slot: by_slot[slot][begun[slot]:end] for slot, end in ends.items()})
            begun |= ends
            self._save(ends)
        twins: dict[int, list[int]] = {}
        for one in placed:
            if one.twin is not None:
                twins.setdefault(one.twin, []).append(one.slot)
        if twins:
            engine.fork(twins)
        self.reused += sum(one.request.reused for one in placed)
        self.prefilled += sum(len(one.request.held) - one.request.reused for one in placed)

    def _save(self, lengths: Mapping[int, int]) -> None:
        entries: dict[tuple[int, int], int] = {}  # of (part, entry), which the last one has that got it
        for slot, length in lengths.items():
            entry = self._prefixes.save(slot, length)
            if entry is not None:
                entries[self.engine.part(slot), entry] = slot
        if entries:
            self.engine.save({slot: entry for (_, entry), slot in entries.items()})

    def _clear(self) -> None:
        self.engine.clear()
        self._prefixes.clear()

    def _one_by_one(self) -> None:
        """Serves each request alone after a failure, so that it ends only those with which the engine fails.

        The caches may be torn, so everyone is prefilled again: streams count positions, nothing is drawn twice.
        """
        for slot, request in sorted(self._active.items()):
            try:
                self._clear()
                self._prefill([_Placed(slot, request)])
                self._generate([slot])
            except Exception as error:
                with self._changed:
                    self._active.pop(slot, None)
                request.emit(Piece([], [], f"error: the engine failed: {error}"))
        try:
            self._clear()
            if self._active:
                self._prefill([_Placed(slot, request) for slot, request in self._active.items()])
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


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A request's slot, what of its tokens is there to be taken up, and the slot to copy where another has the same."""

    slot: int
    request: Request
    hit: Hit | None = None
    twin: int | None = None
