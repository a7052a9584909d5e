"""Rollouts: a policy acts in many conversations at once, and everything that training needs is written down.

All conversations that are open take a turn together: the engine generates until most of them have ended theirs
(the others go on next time), then the environments answer, tool calls running side by side in worker processes,
then the answers go into the caches. A slow answer is not waited for: its conversation sits out.
The samples of one prompt share the prefill of their opening. Conversations beyond the engine's slots wait for
free ones. What a conversation samples depends on its own seed and tokens, so results do not depend on the
schedule. Of several hosts each acts on prompts of its own, with the same calls of the engine; in the end all have all
episodes.

Nothing here knows tasks or text: a conversation is anything that gives tokens and takes tokens
(pipeline.experts has those that are trained on).
"""

import collections
import concurrent.futures
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from qcn_jax.inference.engine import Engine
from qcn_jax.inference.generation import Generation
from qcn_jax.inference.sampling import GREEDY, Sampling
from qcn_jax.sharding import distributed

STRAGGLERS = 0.25  # share of turns under way that the rest does not wait for
# For an answer, before the others go on. Most come sooner, and then what is generated together, and so how sums are
# rounded, does not depend on time.
PATIENCE_SECONDS = 20.0
THREADS = 128  # each only waits for a worker process; how many tools really run at once is the pool's choice


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an environment answers to a turn.

    tokens: what comes before the policy's next turn; of no meaning when `done`.
    malformed: whether the turn broke the format of tool calls.
    failing: whether the turn ended in failing tests.
    repeated: whether those tests had failed on the very same files before, in this conversation.
    """

    tokens: Sequence[int] = ()
    done: bool = False
    malformed: bool = False
    failing: bool = False
    repeated: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What execution said about a finished conversation.

    reward: what the episode earned, less `penalty`.
    solved: the tests pass (or whatever the domain executes succeeds); the pass rate counts these.
    finished: the policy ended the episode itself, before any limit of turns or tokens.
    infrastructure: the verdict is missing for a reason that is not the policy's; such an episode teaches nothing.
    detail: JSON-ready particulars for reports.
    penalty: for how it ended; that alone never makes a prompt one to learn from.
    """

    reward: float
    solved: bool
    finished: bool
    infrastructure: bool = False
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)
    penalty: float = 0.0


class Conversation(Protocol):
    """One episode as the rollout sees it. `reply` and `outcome` may block; they run in threads."""

    def opening(self) -> list[int]:
        """Tokens before the policy's first turn; the same for all samples of a prompt."""

    def reply(self, tokens: list[int], stopped: bool) -> Reply:
        """Takes a turn; `stopped` tells whether it ended with a stop token or was cut off by a limit."""

    def outcome(self, truncated: bool) -> Outcome:
        """The verdict; `truncated` when the conversation grew too long for the engine."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """Tokens [start, stop) of a record were sampled in one turn."""

    start: int
    stop: int
    malformed: bool
    stopped: bool
    failing: bool = False
    repeated: bool = False


@dataclasses.dataclass(frozen=True)
class RolloutRecord:
    """A finished episode.

    Attributes:
      prompt: index of its prompt among those given.
      sample: index among the samples of that prompt.
      tokens: [n] int32, opening, turns and answers.
      sampled: [n] bool, which of them the policy drew; not those of its first turns that it was made to take greedily.
      logprobs: [n] float32, theirs when they were chosen, at the temperature they were drawn at; 0 for the rest.
      turns: the policy's turns in order.
      outcome: what execution said.
      routes: [n, L, k] int16, the experts that every token went to, -1 where that is not known; None where the engine
        keeps none.
    """

    prompt: int
    sample: int
    tokens: np.ndarray
    sampled: np.ndarray
    logprobs: np.ndarray
    turns: tuple[Turn, ...]
    outcome: Outcome
    routes: np.ndarray | None = None

    @property
    def malformed(self) -> float:
        """Share of turns that broke the format."""
        return float(np.mean([turn.malformed for turn in self.turns])) if self.turns else 0.0


Stop = Callable[[], bool]


def never() -> bool:
    """Do not stop."""
    return False


class Stopped(Exception):
    """A rollout was given up because it was asked to."""


class _Open:
    """A conversation that holds a slot."""

    def __init__(
        self, prompt: int, sample: int, conversation: Conversation, seed: int, opening: list[int],
        sampling: Sampling, greedy: int,
    ) -> None:  # fmt: skip
        self.prompt, self.sample, self.conversation, self.seed = prompt, sample, conversation, seed
        self._sampling, self.greedy = sampling, greedy  # turns
        self.tokens, self.logprobs, self.turns = list(opening), [0.0] * len(opening), []
        self.start, self.stopped = len(opening), False  # of the turn under way
        self.routes: np.ndarray | None = None  # of all its tokens, once it gave its slot back

    @property
    def sampling(self) -> Sampling:
        """How its turn under way is drawn."""
        return GREEDY if len(self.turns) < self.greedy else self._sampling

    def generated(self, generation: Generation) -> None:
        self.tokens += generation.tokens
        self.logprobs += generation.drawn_logprobs.tolist()
        self.stopped = generation.finish == "stop"

    def reply(self) -> Reply:
        """Hands the turn to the environment."""
        return self.conversation.reply(self.tokens[self.start :], self.stopped)

    def take(self, reply: Reply) -> None:
        self.turns.append(
            Turn(self.start, len(self.tokens), reply.malformed, self.stopped, reply.failing, reply.repeated)
        )
        if not reply.done:
            self.tokens += reply.tokens
            self.logprobs += [0.0] * len(reply.tokens)
        self.start = len(self.tokens)

    def record(self, outcome: Outcome) -> RolloutRecord:
        sampled = np.zeros(len(self.tokens), bool)
        for turn in self.turns[self.greedy :]:
            sampled[turn.start : turn.stop] = True
        return RolloutRecord(
            self.prompt, self.sample, np.asarray(self.tokens, np.int32), sampled,
            np.asarray(self.logprobs, np.float32), tuple(self.turns), outcome, self._all_routes(),
        )  # fmt: skip

    def _all_routes(self) -> np.ndarray | None:
        if self.routes is None:
            return None
        routes = np.full((len(self.tokens), *self.routes.shape[1:]), -1, np.int16)
        routes[: len(self.routes)] = self.routes
        return routes


def sequence_seed(*parts: int) -> int:
    """A 32-bit seed from integers (run seed, update, prompt, sample); different parts give unrelated streams."""
    return int(np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(1)[0])


def acts_here(prompt: int) -> bool:
    """Whether the conversations of a prompt, by its index, are held on this host."""
    host, hosts = distributed.place()
    return prompt % hosts == host


def rollout(
    engine: Engine,
    groups: Sequence[Sequence[Conversation]],
    seeds: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling],
    greedy_turns: Sequence[int] = (),
    max_new_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Stop = never,
) -> list[RolloutRecord]:
    """Runs every conversation to its end.

    Args:
      engine: whose slots are free; they are free again afterwards.
      groups: conversations by prompt; those of one prompt have the same opening.
      seeds: one for each conversation, in the same nesting.
      sampling: how to draw tokens, for all or for each prompt.
      greedy_turns: how many turns at their start the samples of a prompt take greedily, in turn; none by default.
        Such samples begin where the greedy policy would be, its first mistakes made, and go on by `sampling`.
      max_new_tokens: of one turn (None: the engine's own limit).
      progress: called with (finished, all) conversations after every turn.
      stop: asked after every turn whether to give up.

    Returns:
      Records in the order of `groups`, samples in order within.

    Raises:
      Stopped: `stop` said so; tests under way have ended.
    """
    draws = [sampling] * len(groups) if isinstance(sampling, Sampling) else sampling
    units = _units(groups, seeds, draws, engine.slots, greedy_turns or (0,))
    waiting = deque(unit for unit in units if acts_here(unit[0].prompt))
    total = sum(map(len, waiting))
    free = list(range(engine.slots))
    active: dict[int, _Open] = {}  # by slot; their turn
    asked: dict[int, tuple[_Open, concurrent.futures.Future[Reply]]] = {}  # by slot; the environment's turn
    verdicts: list[tuple[_Open, concurrent.futures.Future[Outcome]]] = []
    threads = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="rollout")
    try:
        while True:
            going, given_up = engine.most(bool(waiting or active or asked), stop())
            if given_up:
                raise Stopped
            if not going:
                break
            for slot, opened in _admit(engine, waiting, free).items():
                if engine.length(slot) < engine.max_length:
                    active[slot] = opened
                else:  # the opening alone fills the slot
                    opened.routes = _routes(engine, slot)
                    verdicts.append((opened, threads.submit(opened.conversation.outcome, True)))
                    free.append(slot)
            for slot in _generate(engine, active, max_new_tokens or engine.max_new_tokens):
                opened = active.pop(slot)
                asked[slot] = opened, threads.submit(opened.reply)
            concurrent.futures.wait([future for _, future in asked.values()], timeout=PATIENCE_SECONDS)
            added = {}
            for slot in [slot for slot, (_, future) in asked.items() if future.done()]:
                opened, future = asked.pop(slot)
                reply = future.result()
                # A further turn needs its answer and at least one token of its own.
                truncated = not reply.done and engine.length(slot) + len(reply.tokens) >= engine.max_length
                opened.take(dataclasses.replace(reply, tokens=(), done=True) if truncated else reply)
                if reply.done or truncated:
                    opened.routes = _routes(engine, slot)
                    verdicts.append((opened, threads.submit(opened.conversation.outcome, truncated)))
                    free.append(slot)
                else:
                    active[slot] = opened
                    added[slot] = reply.tokens
            engine.extend(added)
            if progress is not None:
                progress(sum(verdict.done() for _, verdict in verdicts), total)
        records = [opened.record(verdict.result()) for opened, verdict in verdicts]
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
    if progress is not None:
        progress(total, total)
    everywhere = itertools.chain.from_iterable(distributed.exchanged("episodes", records))
    return sorted(everywhere, key=lambda record: (record.prompt, record.sample))


def _routes(engine: Engine, slot: int) -> np.ndarray | None:
    return engine.routes(slot) if engine.with_routes else None


def _generate(engine: Engine, active: dict[int, _Open], limit: int) -> list[int]:
    """Generates for all open conversations until most turns have ended; returns the slots of those."""
    slots = sorted(active)
    generations = engine.generate(
        slots, seeds=[active[slot].seed for slot in slots],
        sampling=[active[slot].sampling for slot in slots],
        max_new_tokens=[limit - (len(active[slot].tokens) - active[slot].start) for slot in slots],
        enough=int(STRAGGLERS * len(slots)),
    )  # fmt: skip
    for slot, generation in zip(slots, generations, strict=True):
        active[slot].generated(generation)
    return [slot for slot, generation in zip(slots, generations, strict=True) if generation.finish != "paused"]


def _units(
    groups: Sequence[Sequence[Conversation]], seeds: Sequence[Sequence[int]], draws: Sequence[Sampling], slots: int,
    greedy: Sequence[int],
) -> list[list[_Open]]:  # fmt: skip
    """Groups, cut where they are larger than the engine, that are admitted as one."""
    units = []
    for prompt, (group, streams, sampling) in enumerate(zip(groups, seeds, draws, strict=True)):
        opening = list(group[0].opening()) if group else []
        members = [
            _Open(prompt, sample, conversation, seed, opening, sampling, greedy[sample % len(greedy)])
            for sample, (conversation, seed) in enumerate(zip(group, streams, strict=True))
        ]
        units += [members[first : first + slots] for first in range(0, len(members), slots)]
    return units


def _admit(engine: Engine, waiting: deque[list[_Open]], free: list[int]) -> dict[int, _Open]:
    """Gives free slots to the units that wait, in order; one prefill a unit and part of the engine, copied within."""
    admitted: dict[int, _Open] = {}
    prefill, copies = {}, {}
    while waiting and len(waiting[0]) <= len(free):
        unit = waiting.popleft()
        slots = _choose(engine, free, len(unit))
        engine.reset(slots)
        opening = unit[0].tokens
        if len(opening) > engine.max_length:  # keeps its head; such a conversation is truncated at once
            opening = opening[: engine.max_length]
        for _, mine in itertools.groupby(slots, engine.part):
            first, *rest = mine
            prefill[first] = opening
            copies[first] = rest
        admitted |= dict(zip(slots, unit, strict=True))
    engine.extend(prefill)
    engine.fork(copies)
    return admitted


def _choose(engine: Engine, free: list[int], count: int) -> list[int]:
    """Takes `count` of the free slots, of as few parts of the engine as hold them: those with the most free ones."""
    room = collections.Counter(map(engine.part, free))
    free.sort(key=lambda slot: (-room[engine.part(slot)], slot))
    chosen = free[:count]
    del free[:count]
    return chosen
