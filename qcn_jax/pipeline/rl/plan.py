"""What an orchestrator is told to do, and what it asks of the engine and of the environments. No JAX."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

STALE, CACHES = ("drop", "cut"), ("recompute", "keep")


class Actor(Protocol):
    """What is asked of the engine; see inference.engine.Engine."""

    slots: int
    parts: int
    max_length: int
    with_routes: bool

    def most(self, *values: int) -> list[int]:
        """The largest of each value over all hosts."""

    def reset(self, slots: Sequence[int]) -> None:
        """Empties slots."""

    def extend(self, tokens: Mapping[int, Sequence[int]]) -> None:
        """Appends tokens to slots."""

    def fork(self, copies: Mapping[int, Sequence[int]]) -> None:
        """Copies slots."""

    def routes(self, slot: int) -> np.ndarray:
        """The experts of a slot's tokens."""

    def generate(self, slots: Sequence[int], **options: Any) -> list[Any]:
        """One turn, or a piece of it, for each of `slots`."""


class Workers(Protocol):
    """Where environments run."""

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Begins a call."""

    def wait(self, futures: Iterable[Future[Any]], seconds: float | None, everything: bool) -> None:
        """Returns when one of `futures`, or everything, is done, or so much time has passed."""


def host_of(number: int, hosts: int) -> int:
    """The host, of so many, that holds the conversations of a group, where all groups are begun at once."""
    return number % hosts


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an orchestrator is to do.

    Attributes:
      groups: that an update learns from, over all hosts.
      max_new_tokens: of a turn.
      max_staleness: versions of the weights that may lie between what drew a token and what learns from it.
      stale: what becomes of a group that would be older: drop it, or cut, to learn from its newer tokens alone.
      caches: of open episodes, when the weights change: recompute them, or keep them.
      refills: fresh samples for each of a group, in place of those that no verdict came of; see groups.GroupState.
      burst: the most tokens that a tick gives an episode; 0 is a whole turn.
      host, hosts: this one's number, and how many there are; a group goes to the one that holds the fewest.
    """

    groups: int
    max_new_tokens: int
    max_staleness: int = 0
    stale: str = "drop"
    caches: str = "recompute"
    refills: int = 0
    burst: int = 0
    host: int = 0
    hosts: int = 1

    @property
    def fit(self) -> dict[str, Any]:
        """What a journal must have been written with to be gone on with."""
        names = ("groups", "max_staleness", "stale", "refills", "burst", "hosts")
        return {name: getattr(self, name) for name in names}
