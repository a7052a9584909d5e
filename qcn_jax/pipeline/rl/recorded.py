"""An expert's updates as the journals of its hosts tell them: no engine, no environments, no tasks."""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from qcn_jax import files
from qcn_jax.config import ExpertsConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.sampling import Sampling
from qcn_jax.pipeline.rl.events import Events
from qcn_jax.pipeline.rl.groups import Group
from qcn_jax.pipeline.rl.orchestrator import Orchestrator
from qcn_jax.pipeline.rl.plan import Plan
from qcn_jax.pipeline.rl.records import Conversation, RolloutRecord
from qcn_jax.pipeline.rl.rollout import sampled


class Recorded:
    """In place of the engine that acted, see rl.plan.Actor: its shape, and nothing that could be asked to generate."""

    def __init__(self, head: Mapping[str, Any]) -> None:
        """Is as the head of a journal says."""
        self.slots, self.parts = head["slots"], head["slots"] // head["own"]
        self.max_length, self.with_routes = head["max_length"], head["with_routes"]

    def most(self, *values: int) -> list[int]:
        """See Actor; every host's journal tells of its own part alone."""
        return list(values)

    def reset(self, slots: Sequence[int]) -> None:
        """See Actor; slots hold nothing."""


class _Idle:
    """Environments that nothing is asked of but to be closed, see rl.plan.Workers."""

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Calls at once."""
        done: Future[Any] = Future()
        done.set_result(call())
        return done

    def wait(self, futures: Iterable[Future[Any]], seconds: float | None, everything: bool) -> None:
        """All are done."""


class Journals:
    """The journals of one expert, read update by update.

    Attributes:
      updates: that all hosts tell of.
      config: the stage's configuration.
      version: updates read so far.
      with_routes: whether they hold the experts that tokens went to.
    """

    def __init__(self, folder: pathlib.Path, config: ExpertsConfig) -> None:
        """Opens the journals in `folder`, one for each host, of a run with `config`.

        Raises:
          UserError: there is none, one is missing, damaged or of an earlier version, or tells of no whole update from
            the first on.
        """
        self._folder, self.config, self.version = folder, config, 0
        if not files.is_dir(folder) or not (folder / "0").is_dir():
            raise UserError(f"{folder}: holds no journal of episodes; a run keeps one in RUN/experts/NAME/journal")
        first = self._open(0)
        opened = [first, *(self._open(host) for host in range(1, first[0]["fit"]["hosts"]))]
        self._hosts = [self._host(*each) for each in opened]
        self.with_routes = first[0]["with_routes"]
        self.updates = min(host.recorded for host in self._hosts)
        if not self.updates:
            raise UserError(f"{folder}: tells of no whole update yet")

    def _open(self, host: int) -> tuple[dict[str, Any], Events]:
        folder = self._folder / str(host)
        if not folder.is_dir():
            raise UserError(f"{folder}: is missing; the journals of all hosts are needed, copy them there")
        events = Events(folder, writable=False)
        head = next(iter(events.read()), {})
        if not {"fit", "slots", "own", "max_length", "with_routes", "first"} <= head.keys():
            raise UserError(f"{folder}: its events.jsonl does not begin as this version's do")
        if head["first"]:
            raise UserError(f"{folder}: begins behind update {head['first']}; what was learned before is not in it")
        return head, events

    def _host(self, head: dict[str, Any], events: Events) -> Orchestrator:
        plan = Plan(max_new_tokens=head["max_length"], caches="recompute", host=int(events.folder.name), **head["fit"])
        draws = sampled(Sampling(), head.get("greedy_turns", ()))
        group = Group(self.config.group_size, _nobody, lambda sample: 0, **draws)
        return Orchestrator(Recorded(head), _Idle(), lambda number: group, plan, events=events)

    def next(self) -> tuple[list[RolloutRecord], str]:
        """The episodes that the next update took, of all hosts, and the fingerprint of the weights before it.

        Raises:
          UserError: the journals contradict each other, or themselves.
        """
        records: list[RolloutRecord] = []
        weights = set()
        for host in self._hosts:
            try:
                host.begin(self.version)
                records += host.collect()
            except (KeyError, IndexError, StopIteration, ValueError) as error:
                raise UserError(f"{self._folder}: is damaged before update {self.version + 1} ({error!r})") from error
            host.version += 1
            weights.add(host.weights)
        if len(weights) > 1:
            raise UserError(f"{self._folder}: its hosts learned update {self.version + 1} from different weights")
        self.version += 1
        return records, weights.pop()

    def close(self) -> None:
        """Closes the files."""
        for host in self._hosts:
            host.close()


def _nobody(sample: int) -> Conversation:
    raise UserError("an episode of a journal was to be played")
