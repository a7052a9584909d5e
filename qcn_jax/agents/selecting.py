"""Which episodes are kept as conversations to learn from: rejection sampling by execution.

Kept is what resolves its task, ended by itself and held well-formed calls alone (arXiv 2603.00729 drops the rest); of
conversations whose turns are the same, one.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.agents.episode import EndReason
from qcn_jax.agents.records import Record
from qcn_jax.agents.running import Folder

KEPT, DUPLICATE, SURPLUS = "kept", "duplicate", "over per_task"


class Selection:
    """Goes through the episodes of a folder once.

    Args:
      folder: of agents.running.
      episodes: its records.
      per_task: how many of a task are kept at most; 0: all.
      refused: why an episode that would be kept is not; "" where it is.
    """

    def __init__(self, folder: Folder, episodes: Sequence[Record], per_task: int = 0,
                 refused: Callable[[Record], str] = lambda record: "") -> None:
        self._folder, self._episodes, self._per_task, self._refused = folder, episodes, per_task, refused
        self._fates: dict[str, Counter[str]] = defaultdict(Counter)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields what is kept: rows of agents.trajectory.Trajectory, with `attempt` and `model`."""
        seen: set[bytes] = set()
        for record in self._episodes:
            fates = self._fates[record.instance_id]
            fate = fate_of(record)
            fate = fate if fate != KEPT else self._refused(record) or KEPT
            if fate == KEPT and self._per_task and fates[KEPT] >= self._per_task:
                fate = SURPLUS
            if fate == KEPT:
                row = files.read_json(self._folder.trajectory(record, "verified"))
                turns = [message for message in row["messages"] if message["role"] == "assistant"]
                digest = hashlib.sha256(json.dumps([record.instance_id, turns]).encode()).digest()
                if digest in seen:
                    fate = DUPLICATE
                else:
                    seen.add(digest)
                    yield {**row, "attempt": record.attempt}
            fates[fate] += 1

    def yields(self) -> dict[str, Any]:
        """After `rows`: kept and tried of all and of each task, and why the others were not kept."""
        total: Counter[str] = sum(self._fates.values(), Counter())
        return {"tried": total.total(), "kept": total[KEPT], "tasks": len(self._fates),
                "tasks_kept": sum(fates[KEPT] > 0 for fates in self._fates.values()),
                "dropped": {name: count for name, count in sorted(total.items()) if name != KEPT},
                "by_task": {name: {"tried": fates.total(), **dict(sorted(fates.items())), KEPT: fates[KEPT]}
                            for name, fates in self._fates.items()}}


def fate_of(record: Record) -> str:
    """`kept`, or why an episode is dropped."""
    if not record.resolved:
        return record.outcome
    if record.reason != EndReason.SUBMITTED:
        return "not submitted"
    return "malformed" if record.malformed else KEPT
