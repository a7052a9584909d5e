"""One tick of a rollout: who is let in, who generates, who is asked, who has answered. No JAX.

What a tick does follows from the state and from what comes from outside, what was generated and what environments said.
`_tick` takes the latter from a row of the journal where it gets one, and returns it as one where it does not.
"""

import collections
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from qcn_jax.pipeline.rl.groups import Episode, GroupState
from qcn_jax.pipeline.rl.plan import Actor, Plan, Workers
from qcn_jax.pipeline.rl.records import Outcome, Reply

STRAGGLERS = 0.25  # share of turns under way that the rest does not wait for
# For an answer, before the others go on, where nothing is asynchronous. Most come sooner, and then what is generated
# together, and so how sums are rounded, does not depend on time.
PATIENCE_SECONDS = 20.0
# With nothing to generate, on any host; an answer ends it. Of several hosts another may have got one meanwhile.
POLL_SECONDS, POLL_SECONDS_OF_SEVERAL = 1.0, 0.02


class Ticks:
    """The episodes under way, and what is done with them in a tick; see orchestrator.Orchestrator.

    Attributes:
      version: updates behind the weights that act.
      judged: episodes that have ended so far.
      counts: of groups and episodes that were lost, by why.
      ticks: in which episodes of this host generated for the update under way, also those that its journal tells of.
      seconds_waited: with nothing to generate, since `begin` was last called.
    """

    def __init__(self, engine: Actor, workers: Workers, plan: Plan, clock: Callable[[], float],
                 log: Callable[[str], None]) -> None:
        """Begins without episodes; for the arguments see orchestrator.Orchestrator."""
        self._engine, self._workers, self._plan, self._clock, self._log = engine, workers, plan, clock, log
        self.version, self.judged, self.ticks, self.seconds_waited = 0, 0, 0, 0.0
        self.counts: collections.Counter[str] = collections.Counter()
        self._groups: dict[int, GroupState] = {}  # of this host, not used yet
        self._waiting: deque[list[Episode]] = deque()
        self._active: dict[int, Episode] = {}  # by slot; their turn
        self._asked: dict[int, Episode] = {}  # by slot; the environment's turn
        self._judging: dict[tuple[int, int], Episode] = {}
        self._futures: dict[tuple[int, int], Future[Any]] = {}
        self._closing: list[Future[Any]] = []
        self._cold = False  # the engine's caches are not what the journal says
        self._busy = False  # one of several hosts had something to generate when the tick began
        self._shape(**self._geometry)

    @property
    def _geometry(self) -> dict[str, int]:
        return {"slots": self._engine.slots, "own": self._engine.slots // self._engine.parts}

    def _shape(self, slots: int, own: int) -> None:
        self._shaped, self._free = {"slots": slots, "own": own}, list(range(slots))

    def _part(self, slot: int) -> int:
        """The part of the engine that a slot is of."""
        return slot // self._shaped["own"]

    @property
    def _admissible(self) -> bool:
        return bool(self._waiting) and len(self._waiting[0]) <= len(self._free)

    def _tick(self, row: dict[str, Any] | None, acting: bool) -> dict[str, Any]:
        """One tick; `row` is what the journal knows of it, None where it happens now. Returns what to note."""
        noted: dict[str, Any] = {}
        self._admit(row, acting, noted)
        for slot in self._generate(row, acting, noted):
            self._asked[slot] = episode = self._active.pop(slot)
            if row is None:
                self._futures[episode.key] = self._workers.submit(episode.ask)
        if row is None:
            self._wait()
            replies = {slot: self._futures.pop(episode.key).result() for slot, episode in sorted(self._asked.items())
                       if self._futures[episode.key].done()}
            verdicts = [(key, self._futures.pop(key).result()) for key in sorted(self._judging)
                        if self._futures[key].done()]
        else:
            replies = {slot: Reply(tokens.tolist(), *flags) for slot, tokens, *flags in row.get("replies", ())}
            verdicts = [(tuple(key), Outcome(**outcome)) for key, outcome in row.get("verdicts", ())]
        added, emptied = {}, []
        for slot, reply in replies.items():
            episode = self._asked.pop(slot)
            if reply.again:
                episode.take(reply)
                self._active[slot], added[slot] = episode, episode.tokens
                emptied.append(slot)
                continue
            # A further turn needs its answer and at least one token of its own.
            truncated = not reply.done and len(episode.tokens) + len(reply.tokens) >= self._engine.max_length
            episode.take(dataclasses.replace(reply, tokens=(), done=True) if truncated else reply)
            if reply.done or truncated:
                self._end(slot, episode, truncated, row, acting, noted)
            else:
                self._active[slot] = episode
                added[slot] = reply.tokens
        if acting:
            self._engine.reset(emptied)
            self._engine.extend(added)
        for key, outcome in verdicts:
            if key in self._judging:  # its group may have been given up just now
                self._judge(self._judging.pop(key), outcome)
        if row is None and replies:
            noted["replies"] = [[slot, np.asarray(reply.tokens, np.int32), reply.done, reply.malformed, reply.failing,
                                 reply.repeated, reply.again] for slot, reply in replies.items()]
        if row is None and verdicts:
            noted["verdicts"] = [[list(key), dataclasses.asdict(outcome)] for key, outcome in verdicts]
        return noted

    def _wait(self) -> None:
        """Waits for environments as long as it makes sense to."""
        replies = [self._futures[episode.key] for episode in self._asked.values()]
        verdicts = [self._futures[key] for key in self._judging]
        poll = POLL_SECONDS if self._plan.hosts == 1 else POLL_SECONDS_OF_SEVERAL
        began = self._clock()
        if not self._plan.max_staleness and replies:
            self._workers.wait(replies, PATIENCE_SECONDS, True)
        elif not self._active and not self._admissible and not self._busy and (replies or verdicts):
            self._workers.wait([*replies, *verdicts], poll, False)
        self.seconds_waited += self._clock() - began

    def _release(self, slot: int) -> None:
        """A slot is free, and what it held costs nothing from now on."""
        self._free.append(slot)
        if slot < self._engine.slots:  # a journal may tell of an engine with more
            self._engine.reset([slot])

    def _judge(self, episode: Episode, outcome: Outcome) -> None:
        self.judged += 1
        group = self._groups.get(episode.number)
        if group is None:  # it was dropped
            return
        fresh = group.judged(episode.record(outcome), self._plan.refills)
        if fresh is not None:
            self.counts["refilled"] += 1
            self._waiting.appendleft([Episode(episode.number, fresh, group.group, self.version)])
        elif group.given_up:
            self._drop(episode.number)

    def _end(self, slot: int, episode: Episode, truncated: bool, row: dict[str, Any] | None, acting: bool,
             noted: dict[str, Any]) -> None:
        """An episode gives its slot back; what remains is its verdict."""
        episode.ended, episode.truncated = True, truncated
        if self._engine.with_routes:
            if acting:
                episode.went(self._engine.routes(slot))
            else:
                episode.routes = next(routes for of, routes in row["routes"] if of == slot)
            noted.setdefault("routes", []).append([slot, episode.routes])
        self._release(slot)
        self._judging[episode.key] = episode
        if row is None:
            self._futures[episode.key] = self._workers.submit(episode.judge)

    def _generate(self, row: dict[str, Any] | None, acting: bool, noted: dict[str, Any]) -> list[int]:
        """Lets open episodes generate until most turns have ended; returns the slots of those."""
        slots = sorted(self._active)
        made = (row or {}).get("made")
        if acting:
            left = [self._plan.max_new_tokens - (len(self._active[slot].tokens) - self._active[slot].start)
                    for slot in slots]
            burst = self._plan.burst or self._plan.max_new_tokens
            generations = self._engine.generate(
                slots, seeds=[self._active[slot].seed for slot in slots],
                sampling=[self._active[slot].sampling for slot in slots],
                max_new_tokens=[min(burst, count) for count in left], enough=int(STRAGGLERS * len(slots)),
            )  # fmt: skip
            now = _noted(slots, generations, left, self._active, self._engine.max_length)
            if made is not None and now["tokens"].tolist() != made["tokens"].tolist():
                self._log("what the engine generates is not what the journal says: its caches are filled from there")
                self._cold = True
            made = now if row is None else made
        if made is None or not slots:
            return []
        self.ticks += 1
        if row is None:
            noted["made"] = made
        ended, at = [], 0
        for slot, count, finish in zip(made["slots"], made["counts"], made["finish"], strict=True):
            piece = slice(at, at + count)
            self._active[slot].generated(made["tokens"][piece], made["logprobs"][piece], finish, self.version)
            at += count
            if finish != "paused":
                ended.append(slot)
        return ended

    def _admit(self, row: dict[str, Any] | None, acting: bool, noted: dict[str, Any]) -> None:
        """Gives free slots to the units that wait, in order; one prefill a unit and engine part, copied within."""
        known = deque((row or {}).get("openings", ()))
        admitted: dict[int, Episode] = {}
        prefill, copies = {}, {}
        while self._admissible and (row is None or known):
            unit = self._waiting.popleft()
            opening = unit[0].conversation.opening() if row is None else known.popleft().tolist()
            slots = self._choose(len(unit))
            for episode in unit:
                episode.open(opening)
            for _, mine in itertools.groupby(slots, self._part):
                first, *rest = mine
                prefill[first] = opening[: self._engine.max_length]  # keeps its head; it is truncated at once
                copies[first] = rest
            admitted |= dict(zip(slots, unit, strict=True))
            if row is None:
                noted.setdefault("openings", []).append(np.asarray(opening, np.int32))
        if acting:
            self._engine.reset(sorted(admitted))
            self._engine.extend(prefill)
            self._engine.fork(copies)
        for slot, episode in admitted.items():
            if len(episode.tokens) < self._engine.max_length:
                self._active[slot] = episode
            else:  # the opening alone fills the slot
                self._end(slot, episode, True, row, acting, noted)

    def _choose(self, count: int) -> list[int]:
        """Takes `count` of the free slots, of as few engine parts as hold them, those with the most free ones."""
        room = collections.Counter(map(self._part, self._free))
        self._free.sort(key=lambda slot: (-room[self._part(slot)], slot))
        chosen, self._free = self._free[:count], self._free[count:]
        return chosen

    def _drop(self, number: int) -> None:
        """Nothing of a group is wanted any more."""
        units = [[episode for episode in unit if episode.number != number] for unit in self._waiting]
        self._waiting = deque(unit for unit in units if unit)
        for episode in self._taken(lambda episode: episode.number == number):
            self._abandon(episode, self._futures.pop(episode.key, None))

    def _abandon(self, episode: Episode, call: Future[Any] | None) -> None:
        """Frees what an episode holds, as soon as its call under way has ended; one for a verdict does so itself."""
        close = episode.conversation.close if episode.talked else lambda: None
        if call is None:
            self._closing.append(self._workers.submit(close))
        elif call.cancel() or not episode.ended:
            call.add_done_callback(lambda _: close())

    def _taken(self, which: Callable[[Episode], bool]) -> list[Episode]:
        """Takes episodes away from where they are."""
        found = []
        for held in (self._active, self._asked):
            for slot in [slot for slot, episode in held.items() if which(episode)]:
                found.append(held.pop(slot))
                self._release(slot)
        for key in [key for key, episode in self._judging.items() if which(episode)]:
            found.append(self._judging.pop(key))
        return found

    def _fill(self, held: Mapping[int, Episode]) -> None:
        """Gives the engine what open episodes hold."""
        self._engine.reset(sorted(held))
        self._engine.extend({slot: held[slot].tokens for slot in sorted(held)})


def _noted(slots: Sequence[int], generations: Sequence[Any], left: Sequence[int], active: Mapping[int, Episode],
           max_length: int) -> dict[str, Any]:
    """What was generated, for the journal; a turn that only a tick's own limit ended goes on."""
    finish = []
    for slot, generation, count in zip(slots, generations, left, strict=True):
        new = len(generation.tokens)
        open_ = new < count and len(active[slot].tokens) + new < max_length
        finish.append("paused" if generation.finish == "length" and open_ else generation.finish)
    chain = lambda parts, dtype: np.asarray(list(itertools.chain.from_iterable(parts)), dtype)
    return {"slots": list(slots), "counts": [len(generation.tokens) for generation in generations], "finish": finish,
            "tokens": chain((generation.tokens for generation in generations), np.int32),
            "logprobs": chain((generation.drawn_logprobs for generation in generations), np.float32)}
