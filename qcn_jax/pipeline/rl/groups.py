"""Groups of episodes under way: what is given of a prompt, and how far each of its samples has come. No JAX."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcn_jax.pipeline.rl.records import Conversation, Outcome, Reply, RolloutRecord, Turn, sequence_seed


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt and the samples that are to be had of it.

    Attributes:
      size: how many.
      open: sample -> a fresh conversation; the samples of a group have the same opening.
      seed: sample -> the seed of its stream.
      draw: (sample, turn) -> how that turn is drawn, an inference.sampling.Sampling.
      greedy: sample -> how many turns at its start are taken greedily, and not learned from.
      again: how a turn is drawn that its environment did not take (Reply.again); None: as before, from another stream.
    """

    size: int
    open: Callable[[int], Conversation]
    seed: Callable[[int], int]
    draw: Callable[[int, int], Any]
    greedy: Callable[[int], int] = lambda sample: 0
    again: Any = None


class Episode:
    """A sample under way.

    Attributes:
      number: of its group.
      tokens, logprobs, versions: what was said so far; see records.RolloutRecord.
      start, stopped: of the turn under way, or about to begin.
      routes: of its first tokens, those that are known; None where none are kept.
      ended, truncated: nothing but the verdict is missing; because it grew too long.
      redrawn: draws of the turn under way, or about to begin, that count for nothing.
    """

    def __init__(self, number: int, sample: int, group: Group, opened: int) -> None:
        self.number, self.sample, self.group, self.opened = number, sample, group, opened
        self._seed, self.greedy = group.seed(sample), group.greedy(sample)
        self.redrawn = 0
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.turns: list[Turn] = []
        self.start, self.stopped, self.ended, self.truncated = 0, False, False, False
        self.routes: np.ndarray | None = None
        self._conversation: Conversation | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Group and sample."""
        return self.number, self.sample

    @property
    def conversation(self) -> Conversation:
        """Made when first asked for: an episode that is only read again from a journal needs none."""
        if self._conversation is None:
            self._conversation = self.group.open(self.sample)
        return self._conversation

    @property
    def talked(self) -> bool:
        """Whether there is a conversation that holds something."""
        return self._conversation is not None

    @property
    def sampling(self) -> Any:
        """How its turn under way is drawn."""
        if self.redrawn and self.group.again is not None:
            return self.group.again
        return self.group.draw(self.sample, len(self.turns))

    @property
    def seed(self) -> int:
        """Of the stream that it draws from: another one behind every turn that is drawn again."""
        redrawn = sum(turn.redrawn for turn in self.turns) + self.redrawn
        return sequence_seed(self._seed, redrawn) if redrawn else self._seed

    def open(self, opening: Sequence[int]) -> None:
        """Takes what comes before the first turn."""
        self.tokens, self.logprobs, self.versions = list(opening), [0.0] * len(opening), [-1] * len(opening)
        self.start = len(opening)

    def generated(self, tokens: Sequence[int], logprobs: Sequence[float], finish: str, version: int) -> None:
        """Takes tokens that the policy drew."""
        self.tokens += [int(token) for token in tokens]
        self.logprobs += [float(value) for value in logprobs]
        self.versions += [version] * len(tokens)
        self.stopped = finish == "stop"

    def ask(self) -> Reply:
        """Hands the turn to the environment."""
        return self.conversation.reply(self.tokens[self.start :], self.stopped)

    def judge(self) -> Outcome:
        """Asks for the verdict."""
        return self.conversation.outcome(self.truncated)

    def take(self, reply: Reply) -> None:
        """Takes the environment's answer."""
        if reply.again:
            del self.tokens[self.start :], self.logprobs[self.start :], self.versions[self.start :]
            self.routes = None if self.routes is None else self.routes[: self.start]
            self.redrawn += 1
            return
        self.turns.append(Turn(self.start, len(self.tokens), reply.malformed, self.stopped, reply.failing,
                               reply.repeated, self.redrawn))
        self.redrawn = 0
        if not reply.done:
            self.tokens += [int(token) for token in reply.tokens]
            self.logprobs += [0.0] * len(reply.tokens)
            self.versions += [-1] * len(reply.tokens)
        self.start = len(self.tokens)

    def went(self, routes: np.ndarray | None) -> None:
        """Takes the routes of its tokens, from the first on; those that are known already stay as they were."""
        if routes is not None:
            known = 0 if self.routes is None else len(self.routes)
            routes = np.asarray(routes).astype(np.int16)
            self.routes = routes if self.routes is None else np.concatenate([self.routes, routes[known:]])

    def rebuild(self) -> bool:
        """Says to a fresh conversation what was said before; whether it answered alike."""
        self.conversation.opening()
        ends = [*(turn.start for turn in self.turns[1:]), self.start]
        for turn, end in zip(self.turns, ends):
            for _ in range(turn.redrawn + 1):  # of draws that were not taken only the number is known
                reply = self.conversation.reply(self.tokens[turn.start : turn.stop], turn.stopped)
                if not reply.again:
                    break
            answer = [] if reply.done else list(reply.tokens)
            given = (turn.malformed, turn.failing, turn.repeated)
            if not self.truncated and answer != self.tokens[turn.stop : end]:
                return False
            if (reply.malformed, reply.failing, reply.repeated) != given:
                return False
        return True

    def record(self, outcome: Outcome) -> RolloutRecord:
        """What is written down in the end."""
        sampled = np.zeros(len(self.tokens), bool)
        for turn in self.turns[self.greedy :]:
            sampled[turn.start : turn.stop] = True
        return RolloutRecord(
            self.number, self.sample, np.asarray(self.tokens, np.int32), sampled,
            np.asarray(self.logprobs, np.float32), tuple(self.turns), outcome, self._all_routes(),
            np.asarray(self.versions, np.int32), self.opened,
        )  # fmt: skip

    def _all_routes(self) -> np.ndarray | None:
        if self.routes is None:
            return None
        routes = np.full((len(self.tokens), *self.routes.shape[1:]), -1, np.int16)
        routes[: len(self.routes)] = self.routes[: len(self.tokens)]
        return routes


class GroupState:
    """How far a group has come.

    Attributes:
      records: of samples with a verdict, and of those that failed for reasons of infrastructure.
      real: how many of them have a verdict.
      failed: how many have not.
      given_up: too many failed.
    """

    def __init__(self, number: int, group: Group, opened: int) -> None:
        self.number, self.group, self.opened = number, group, opened
        self.records: list[RolloutRecord] = []
        self.real = self.failed = 0
        self.given_up = False

    @property
    def finished(self) -> bool:
        """Whether an update may use it."""
        return self.given_up or self.real >= self.group.size

    def ended(self) -> list[RolloutRecord]:
        """Its episodes; where it was given up none of them counts, as they would be an incomplete group."""
        if not self.given_up:
            return self.records
        void = lambda outcome: dataclasses.replace(outcome, infrastructure=True)
        return [dataclasses.replace(record, outcome=void(record.outcome)) for record in self.records]

    def judged(self, record: RolloutRecord, refills: int) -> int | None:
        """Takes an episode that has ended; returns the number of the fresh sample that is to take its place, if one is.

        Args:
          record: its.
          refills: fresh samples that there may be for each sample of the group; with 0 what failed is left out.
        """
        self.records.append(record)
        if not record.outcome.infrastructure:
            self.real += 1
            return None
        self.failed += 1
        if not refills:
            self.real += 1  # one less to wait for
            return None
        if self.failed > refills * self.group.size:
            self.given_up = True
            return None
        return self.group.size + self.failed - 1
