"""An engine, environments and a clock without JAX, threads or time, for thousands of schedules in seconds."""

import dataclasses
import heapq
import itertools
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from qcn_jax.pipeline.rl.groups import Group
from qcn_jax.pipeline.rl.orchestrator import Orchestrator
from qcn_jax.pipeline.rl.plan import Plan
from qcn_jax.pipeline.rl.records import Outcome, Reply

END = 1


def number(*parts: Any) -> int:
    """A number that looks random and follows from `parts`."""
    return zlib.crc32(repr(parts).encode())


class Clock:
    """Seconds that pass when they are told to; calls end at times that are set when they begin."""

    def __init__(self) -> None:
        self.now, self.ends, self._order = 0.0, [], itertools.count()

    def __call__(self) -> float:
        return self.now

    def at(self, seconds: float, future: Future, call) -> None:
        heapq.heappush(self.ends, (self.now + seconds, next(self._order), future, call))

    def until(self, time: float) -> None:
        while self.ends and self.ends[0][0] <= time:
            self.now, _, future, call = heapq.heappop(self.ends)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except Exception as error:
                    future.set_exception(error)
        self.now = max(self.now, time)


class Places:
    """Workers of a Clock: a call of an episode takes as long as `latency` says of it."""

    def __init__(self, clock: Clock, latency) -> None:
        self.clock, self.latency = clock, latency

    def submit(self, call) -> Future:
        future: Future = Future()
        self.clock.at(self.latency(call), future, call)
        return future

    def wait(self, futures: Iterable[Future], seconds: float | None, everything: bool) -> None:
        futures, end = list(futures), float("inf") if seconds is None else self.clock.now + seconds
        enough = all if everything else any
        while self.clock.ends and not (futures and enough(future.done() for future in futures)):
            if self.clock.ends[0][0] > end:
                self.clock.until(end)
                return
            self.clock.until(self.clock.ends[0][0])


class Speller:
    """An engine whose tokens follow from what a slot holds, its seed and the weights, which are a number."""

    def __init__(self, clock: Clock, slots: int = 6, parts: int = 2, max_length: int = 40, routes: bool = True) -> None:
        self.clock, self.slots, self.parts, self.max_length, self.with_routes = clock, slots, parts, max_length, routes
        self.params, self.calls, self.generated = 0, [], 0
        # (token, weights that saw it, a number that follows from all of these up to here)
        self.held: list[list[tuple[int, int, int]]] = [[] for _ in range(slots)]

    def _see(self, slot: int, token: int) -> None:
        before = self.held[slot][-1][2] if self.held[slot] else 0
        self.held[slot].append((token, self.params, number(before, token, self.params)))

    def most(self, *values: int) -> list[int]:
        return list(values)

    def reset(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.held[slot] = []

    def extend(self, tokens: Mapping[int, Sequence[int]]) -> None:
        for slot, added in tokens.items():
            for token in added:
                self._see(slot, int(token))
            assert len(self.held[slot]) <= self.max_length
        self.calls.append(("extend", sorted((slot, tuple(added)) for slot, added in tokens.items())))

    def fork(self, copies: Mapping[int, Sequence[int]]) -> None:
        for origin, targets in copies.items():
            for target in targets:
                assert origin * self.parts // self.slots == target * self.parts // self.slots
                self.held[target] = list(self.held[origin])

    def routes(self, slot: int) -> np.ndarray:
        return np.asarray([[[number(token, weights) % 7]] for token, weights, _ in self.held[slot]], np.uint16
                          ).reshape(-1, 1, 1)

    def generate(self, slots, *, seeds, sampling, max_new_tokens, enough) -> list[Any]:
        pieces = []
        for slot, seed, most in zip(slots, seeds, max_new_tokens, strict=True):
            assert self.held[slot]
            tokens, logprobs = [], []
            for _ in range(min(most, self.max_length - len(self.held[slot]))):
                drawn = number(self.held[slot][-1][2], seed, self.params)  # caches matter, not tokens alone
                token = END if drawn % 5 == 0 else 2 + drawn % 20
                tokens.append(token)
                logprobs.append(-(drawn % 97) / 10)
                self._see(slot, token)
                self.generated += 1
                if token == END:
                    break
            finish = "stop" if tokens and tokens[-1] == END else "length"
            pieces.append(Piece(tokens, np.asarray(logprobs, np.float32), finish))
        self.clock.until(self.clock.now + 0.1 * max((len(piece.tokens) for piece in pieces), default=0))
        self.calls.append(("generate", list(slots), [piece.tokens for piece in pieces]))
        return pieces


@dataclasses.dataclass
class Piece:
    """Of a turn; see inference.generation.Generation."""

    tokens: list[int]
    drawn_logprobs: np.ndarray
    finish: str


class Talk:
    """An episode of some turns; `open_` counts those that hold a sandbox, `fails` says which have no verdict.

    One in `again` of its turns, which ones depends on their tokens, is to be drawn once more (0: none).
    """

    open_: set[tuple[int, int]] = set()

    def __init__(self, group: int, sample: int, fails, again: int = 0) -> None:
        self.key, self._fails, self._turns, self._again = (group, sample), fails, 0, again

    def opening(self) -> list[int]:
        Talk.open_.add(self.key)
        return [2 + number(self.key[0]) % 20] * (1 + number("opening", self.key[0]) % 5)

    def reply(self, tokens: list[int], stopped: bool) -> Reply:
        Talk.open_.add(self.key)
        if self._again and number("again", self.key, self._turns, tokens) % self._again == 0:
            return Reply(again=True)
        self._turns += 1
        drawn = number(self.key, self._turns, tokens)
        return Reply([2 + drawn % 9] * (1 + drawn % 3), done=drawn % 3 == 0, malformed=drawn % 7 == 0)

    def outcome(self, truncated: bool) -> Outcome:
        Talk.open_.discard(self.key)
        broken = self._fails(*self.key)
        return Outcome(0.0 if broken else number("reward", self.key) % 2, False, not truncated, infrastructure=broken)

    def close(self) -> None:
        Talk.open_.discard(self.key)


class Meeting:
    """Hosts in threads that wait for one another, as processes do in a collective."""

    def __init__(self, hosts: int) -> None:
        self._barrier, self._values = threading.Barrier(hosts, timeout=120), [None] * hosts

    def exchange(self, host: int):
        def exchanged(value):
            self._values[host] = value
            self._barrier.wait()
            found = list(self._values)
            self._barrier.wait()
            return found

        return exchanged

    def most(self, host: int):
        exchanged = self.exchange(host)
        return lambda *values: [max(column) for column in zip(*exchanged(values), strict=True)]


def never_fails(group: int, sample: int) -> bool:
    return False


@dataclasses.dataclass
class World:
    """An orchestrator and all that it deals with; latencies follow from `seed` and the episode."""

    plan: Plan
    seed: int = 0
    slowest: float = 3.0
    fails: Any = never_fails
    size: int = 3
    slots: int = 6
    events: Any = None
    meeting: Any = None
    again: int = 0

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.engine = Speller(self.clock, slots=self.slots)
        if self.meeting:
            self.engine.most = self.meeting.most(self.plan.host)
        self.acting = Orchestrator(
            self.engine, Places(self.clock, self.latency), self.group, self.plan, events=self.events, clock=self.clock,
            exchange=self.meeting.exchange(self.plan.host) if self.meeting else lambda value: [value])

    def latency(self, call) -> float:
        """Of a reply or a verdict, by what it is of and not by when it is asked for."""
        episode = getattr(call, "__self__", None)
        if getattr(call, "__name__", "") in ("ask", "judge"):
            return self.slowest * (number(self.seed, call.__name__, episode.key, len(episode.turns)) % 1000) / 1000
        return 0.0  # of what a run that goes on has to do again

    def group(self, place: int) -> Group:
        return Group(self.size, lambda sample: Talk(place, sample, self.fails, self.again),
                     lambda sample: number("seed", place, sample), lambda sample, turn: None)

    def update(self, version: int, stop=lambda: False):
        self.engine.params = version
        self.acting.begin(version)
        return self.acting.collect(stop)
