"""What a rollout knows of episodes: the conversation that one is, what its environment answers, what is written down.

Plain data without JAX, which the orchestrator, its journal and the tests of both share.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an environment answers to a turn.

    tokens: what comes before the policy's next turn; of no meaning when `done`.
    malformed: whether the turn broke the format of tool calls.
    failing: whether the turn ended in failing tests.
    repeated: whether those tests had failed on the very same files before, in this conversation.
    again: the turn counts for nothing and is to be drawn once more; the environment is as it was before it.
    """

    tokens: Sequence[int] = ()
    done: bool = False
    malformed: bool = False
    failing: bool = False
    repeated: bool = False
    again: bool = False


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

    def close(self) -> None:
        """Gives up without a verdict, and frees what the episode holds; may be called at any time."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """Tokens [start, stop) of a record were sampled in one turn; before, `redrawn` draws of it counted for nothing."""

    start: int
    stop: int
    malformed: bool
    stopped: bool
    failing: bool = False
    repeated: bool = False
    redrawn: int = 0


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
      versions: [n] int32, by which policy a token was drawn: how many updates it had behind it; -1 for the rest.
      opened: the version under which the episode began.
    """

    prompt: int
    sample: int
    tokens: np.ndarray
    sampled: np.ndarray
    logprobs: np.ndarray
    turns: tuple[Turn, ...]
    outcome: Outcome
    routes: np.ndarray | None = None
    versions: np.ndarray | None = None
    opened: int = 0

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


def sequence_seed(*parts: int) -> int:
    """A 32-bit seed from integers (run seed, update, prompt, sample); different parts give unrelated streams."""
    return int(np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(1)[0])
