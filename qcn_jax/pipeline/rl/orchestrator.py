"""Who acts, who waits for an environment, which groups an update learns from. No JAX, and a clock of any kind.

The orchestrator goes in ticks. In one it gives free slots to episodes that wait, lets all that may act generate a
piece, hands turns that have ended to their environments, and takes what these have answered since. An update takes the
groups that finished first. With `max_staleness` 0 the groups of the next update are not begun before it; above,
episodes stay open over updates and go on under the new weights, every token knows the version that drew it, and what
would be learned from too late is dropped or cut.

Everything that comes from outside, what was generated and what environments said, goes into a journal (events.py),
by tick. The rest follows from it. A run that was killed reads the journal again up to its last checkpoint, learns once
more from what the journal tells of the updates behind that, and since the last of them repeats the engine's calls, so
that caches are what they were.
"""

import collections
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qcn_jax.pipeline.rl.events import Events
from qcn_jax.pipeline.rl.groups import Episode, Group, GroupState
from qcn_jax.pipeline.rl.plan import Actor, Plan, Workers
from qcn_jax.pipeline.rl.records import RolloutRecord, Stop, Stopped, never
from qcn_jax.pipeline.rl.ticks import Ticks

TICK, UPDATE, BACK, HEAD = "tick", "update", "back", "head"


class Orchestrator(Ticks):
    """See the module's text, and Ticks for attributes.

    Attributes:
      recorded: updates of which the journal tells and that were not asked for yet.
      weights: which ones acted before the last update, as far as that is known.
    """

    recorded = 0
    weights = ""

    def __init__(
        self, engine: Actor, workers: Workers, group_of: Callable[[int], Group], plan: Plan, *,
        events: Events | None = None, total: int | None = None,
        exchange: Callable[[Any], list[Any]] = lambda value: [value], clock: Callable[[], float] = time.monotonic,
        log: Callable[[str], None] = lambda line: None, head: Mapping[str, Any] = {},
    ) -> None:  # fmt: skip
        """Reads the journal, if there is one; all hosts do so together.

        Args:
          engine: whose slots are free.
          workers: run environments.
          group_of: number, from 0 -> what it is.
          plan: see Plan.
          events: the journal of this host.
          total: groups that there are; None is no end.
          exchange: what a host knows -> what all hosts know, in their order.
          clock: seconds.
          log: takes a line.
          head: what else the journal is to say at its beginning, for whoever reads it without an engine.
        """
        super().__init__(engine, workers, plan, clock, log)
        self._group_of, self._events, self._total, self._exchange = group_of, events, total, exchange
        self._used = self._next = self._ticks = 0
        self._hosts_of: dict[int, int] = {}  # group -> the host that holds it, of all that are begun and not used yet
        self._script: deque[dict[str, Any]] = deque()  # what the journal tells, and is still to be read again
        self._head = {"first": 0, "max_length": engine.max_length, "with_routes": engine.with_routes, **head}
        self._behind = events is not None  # it may tell of ticks behind the last update
        if events is not None:
            self._read(events)

    def _read(self, events: Events) -> None:
        rows = events.read()
        if rows and rows[0].get("fit") != self._plan.fit:
            self._log("the journal of episodes was written with other settings, and is begun anew")
            events.keep(lambda row: False)
            rows = []
        (last,) = self._engine.most(-(rows[-1]["t"] if rows else -1))  # another host may know less
        events.keep(lambda row: row["t"] <= -last)
        self._script = deque(row for row in rows if row["t"] <= -last)
        self.recorded = sum(row["kind"] == UPDATE for row in self._script)
        if self._script:
            self._stand(self._script[0].get("first", 0))
        else:
            self._begin_journal()

    def _stand(self, version: int) -> None:
        """Nothing is open, behind `version` updates."""
        self._taken(lambda episode: True)
        self._groups.clear()
        self._waiting.clear()
        self._hosts_of.clear()
        self.version, self._used, self._next = version, version * self._plan.groups, version * self._plan.groups

    def _begin_journal(self) -> None:
        self._write(HEAD, {"fit": self._plan.fit, **self._geometry, **self._head, "first": self.version})

    def _write(self, kind: str, row: Mapping[str, Any], durable: bool = False) -> None:
        if self._events is not None:
            self._events.add({"t": self._ticks, "kind": kind, **row}, durable)

    def resume(self, version: int) -> None:
        """Goes on behind `version` updates, with what the journal tells of them."""
        while self.version < version and self.recorded:
            self.begin(self.version)
            self._replay()
            self.version += 1
        if self.version < version:
            self._script.clear()
            self._stand(version)
            if self._events is not None and version:
                self._log(f"the journal of episodes ends before update {version}, and is begun anew there")
                self._events.keep(lambda row: False)
                self._begin_journal()

    def _replay(self) -> list[RolloutRecord]:
        """The records of the next update, of which the journal tells."""
        while True:
            row = self._script.popleft()
            self._ticks = row["t"]
            if row["kind"] == UPDATE:
                self.recorded -= 1
                self.weights = row.get("weights", "")
                return self._use(self._events.load(row))
            self._again(row, acting=False)

    def _again(self, row: dict[str, Any], acting: bool) -> None:
        """What a row says that is no update's."""
        if row["kind"] == HEAD:
            self._shape(row["slots"], row["own"])
        elif row["kind"] == BACK:
            self._put_back([tuple(key) for key in row["keys"]])
        else:
            self._tick(self._events.load(row), acting)

    def _catch_up(self) -> None:
        """Repeats the ticks since the last update, the engine's calls too where its caches can be had so."""
        shapes = [row for row in self._script if row["kind"] == HEAD] or [self._shaped]
        moved, mixed, last = self._engine.most(
            any(shapes[-1][name] != value for name, value in self._geometry.items()),
            self._plan.caches == "keep" and bool(self._active or self._asked),
            self._script[-1]["t"] if self._script else self._ticks)
        first = self._ticks
        self._cold = bool(moved or mixed)
        if not self._cold:
            self._renew()
        for self._ticks in range(first, last + 1):
            self._cold = any(self._engine.most(self._cold))
            acting = not self._cold
            rows = []
            while self._script and self._script[0]["t"] <= self._ticks:
                rows.append(self._script.popleft())
            if acting and self._ticks > first and not any(row["kind"] == TICK for row in rows):
                self._tick({}, acting)  # another host had something to do
            for row in rows:
                self._again(row, acting)
        self._cold = any(self._engine.most(self._cold))
        if moved:
            held = (*self._active.values(), *self._asked.values())
            self._put_back(sorted(episode.key for episode in held), note=True)
            self._shape(**self._geometry)
            self._write(HEAD, self._geometry)
        elif self._cold:
            self._fill(self._active | self._asked)
        self._go_on()

    def _go_on(self) -> None:
        """Tells the environments of open episodes what was said, and asks what they have not answered."""
        there = [*self._active.values(), *self._asked.values(), *self._judging.values()]
        again = {episode.key: self._workers.submit(episode.rebuild) for episode in there}
        self._workers.wait(again.values(), None, True)
        lost = sorted(key for key, future in again.items() if not future.result())
        if lost:
            self._log(f"{len(lost)} open episodes begin again: their environments do not answer as they did")
            self._put_back(lost, note=True)
        for episode in self._asked.values():
            self._futures[episode.key] = self._workers.submit(episode.ask)
        for episode in self._judging.values():
            self._futures[episode.key] = self._workers.submit(episode.judge)

    def _put_back(self, keys: Sequence[tuple[int, int]], note: bool = False) -> None:
        """Begins open episodes again."""
        for key in keys:
            episode = self._taken(lambda episode: episode.key == key)[0]
            if note and episode.talked:
                episode.conversation.close()
            self._waiting.appendleft([Episode(*key, episode.group, self.version)])
        self.counts["put_back"] += len(keys)
        if note and keys:
            self._write(BACK, {"keys": [list(key) for key in keys]})

    def begin(self, version: int, weights: str = "") -> None:
        """The weights are from now on those of `version`; groups are begun, and caches made anew where they must be.

        Args:
          version: updates behind them.
          weights: which they are, for the journal (train.fingerprint).
        """
        self.version, self.ticks, self.seconds_waited, self.weights = version, 0, 0.0, weights
        limit = self._used + (1 + self._plan.max_staleness) * self._plan.groups
        limit = limit if self._total is None else min(limit, self._total)
        held = collections.Counter(self._hosts_of.values())
        while self._next < limit:
            # A host whose environments hang keeps what it has, and the others get what is new.
            host = min(range(self._plan.hosts), key=lambda host: (held[host], host))
            self._hosts_of[self._next] = host
            held[host] += 1
            if host == self._plan.host:
                self._start(self._next)
            self._next += 1
        if not self.recorded and not self._behind:
            self._renew()

    def _renew(self) -> None:
        """Makes the caches of open episodes anew, if they are not kept."""
        held = self._active | self._asked
        if any(self._engine.most(bool(held))) and self._plan.caches == "recompute":
            self._fill(held)

    def _start(self, number: int) -> None:
        group = self._group_of(number)
        self._groups[number] = GroupState(number, group, self.version)
        members = [Episode(number, sample, group, self.version) for sample in range(group.size)]
        slots = self._shaped["slots"]
        self._waiting.extend(members[first : first + slots] for first in range(0, len(members), slots))

    def collect(self, stop: Stop = never, progress: Callable[[int], None] | None = None) -> list[RolloutRecord]:
        """Acts until there are groups enough for an update; returns those of this host's episodes that it takes.

        Args:
          stop: asked in every tick whether to give up.
          progress: called with the episodes that have ended, after every tick.

        Raises:
          Stopped: `stop` said so, here or on another host.
        """
        if self.recorded:
            return self._replay()
        if self._behind:
            self._behind = False
            self._catch_up()
        place = [0] * self._plan.hosts
        while True:
            place[self._plan.host] = sum(group.finished for group in self._groups.values())
            stopping, busy, *ready = self._engine.most(stop(), bool(self._active or self._admissible), *place)
            if stopping:
                raise Stopped
            if sum(ready) >= self._plan.groups:
                return self._choose_groups()
            self._ticks += 1
            self._busy = busy and self._plan.hosts > 1
            noted = self._tick(None, acting=True)
            if noted or (busy and self._plan.hosts > 1):
                self._write(TICK, noted)
            if progress is not None:
                progress(self.judged)

    def _choose_groups(self) -> list[RolloutRecord]:
        """The oldest of the groups that have finished; what would be too old for the update behind is lost."""
        oldest = self.version + 1 - self._plan.max_staleness if self._plan.stale == "drop" else 0
        ready = [(group.opened, number) for number, group in self._groups.items() if group.finished]
        late = [number for number, group in self._groups.items() if not group.finished and group.opened < oldest]
        everywhere = self._exchange((ready, late))
        order = sorted(pair for ready, _ in everywhere for pair in ready)
        chosen = [number for _, number in order[: self._plan.groups]]
        lost = [number for _, late in everywhere for number in late]
        lost += [number for opened, number in order[self._plan.groups :] if opened < oldest]
        held = self._active | self._asked if self._engine.with_routes else {}
        routes = [[slot, np.asarray(self._engine.routes(slot), np.int16)] for slot in sorted(held)]
        row = {"version": self.version, "weights": self.weights, "chosen": sorted(chosen), "lost": sorted(lost),
               "routes": routes}
        self._ticks += 1
        self._write(UPDATE, row, durable=True)
        return self._use(row)

    def _use(self, row: Mapping[str, Any]) -> list[RolloutRecord]:
        """Takes the groups of an update; see `_choose_groups`."""
        chosen, lost = row["chosen"], row["lost"]
        for slot, routes in row["routes"]:
            (self._active | self._asked)[slot].went(routes)
        self._used += len(chosen) + len(lost)
        for number in (*chosen, *lost):
            del self._hosts_of[number]
        self.counts["stale_groups"] += sum(number in self._groups for number in lost)
        for number in lost:
            if self._groups.pop(number, None) is not None:
                self._drop(number)
        groups = [self._groups.pop(number) for number in sorted(chosen) if number in self._groups]
        self.counts["given_up_groups"] += sum(group.given_up for group in groups)
        found = [record for group in groups for record in group.ended()]
        return sorted(found, key=lambda record: (record.prompt, record.sample))

    def close(self) -> None:
        """Gives up what is open; calls under way end first."""
        for episode in self._taken(lambda episode: True):
            self._abandon(episode, self._futures.get(episode.key))
        self._workers.wait([*self._futures.values(), *self._closing], None, True)
        if self._events is not None:
            self._events.close()
