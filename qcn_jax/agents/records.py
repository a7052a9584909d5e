"""What became of episodes: one record each, and the numbers that many of them give."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax import statistics
from qcn_jax.agents.episode import LIMITS, EndReason, EpisodeResult
from qcn_jax.envs.tasks.verdicts import SUSPECTED_EXPLOIT, Verdict

RESOLVED, UNRESOLVED, LIMIT, INFRASTRUCTURE = "resolved", "unresolved", "limit", "infrastructure"
OUTCOMES = (RESOLVED, UNRESOLVED, LIMIT, INFRASTRUCTURE, SUSPECTED_EXPLOIT)


@dataclasses.dataclass(frozen=True)
class Record:
    """One episode that is over, or a patch that was made elsewhere.

    Attributes:
      outcome: one of OUTCOMES. `limit`: a limit ended it and what it left does not resolve the task; infrastructure is
        none of the agent's doing and does not count.
      reason: how the episode ended (agents.episode.EndReason); empty where a patch was given.
      guard: calls by what the guard said: allowed, blocked, blocked/RULE.
      verdict: on the patch; None where nothing was graded.
      detail: of a failure of the infrastructure, in words.
    """

    instance_id: str
    attempt: int
    outcome: str
    reason: str = ""
    patch: str = ""
    turns: int = 0
    malformed: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    guard: Mapping[str, int] = dataclasses.field(default_factory=dict)
    verdict: Mapping[str, Any] | None = None
    detail: str = ""

    @property
    def key(self) -> str:
        """Names the episode in a journal."""
        return f"{self.instance_id}/{self.attempt}"

    @property
    def resolved(self) -> bool:
        """Whether the patch resolves the task."""
        return self.outcome == RESOLVED

    @property
    def clean(self) -> bool:
        """Whether it is worth learning from: resolved, ended by the agent itself, every turn well formed."""
        return self.resolved and self.reason == EndReason.SUBMITTED and not self.malformed

    @property
    def counts(self) -> bool:
        """Whether anything is known about the agent from it."""
        return self.outcome != INFRASTRUCTURE

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready row."""
        return dataclasses.asdict(self) | {"guard": dict(self.guard)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Record":
        """Reads what `to_json` gave."""
        return cls(**row)


def outcome_of(verdict: Verdict, result: EpisodeResult | None = None) -> str:
    """Which of OUTCOMES a verdict is, on what an episode or somebody else left."""
    if verdict.outcome in (RESOLVED, INFRASTRUCTURE, SUSPECTED_EXPLOIT):
        return verdict.outcome
    return LIMIT if result is not None and result.reason in LIMITS else UNRESOLVED


def summary(tasks: Sequence[str], records: Sequence[Record], attempts: int) -> dict[str, Any]:
    """The numbers of a set of tasks.

    Args:
      tasks: ids of all of them; one without a record is not resolved.
      records: at most `attempts` for each task.
      attempts: for each task.

    Returns:
      resolved and attempted (episodes that count), rate with its 95 % interval, `pass_at` by k, counts of outcomes and
      of the guard's refusals, sums of turns and tokens. Intervals are Wilson's where every task gives yes or no, else
      percentiles of a bootstrap over tasks, whose attempts are not independent.
    """
    known, by_task = set(tasks), defaultdict(list)
    for record in records:
        if record.instance_id in known:
            by_task[record.instance_id].append(record)
    counted = {name: [record.resolved for record in by_task[name] if record.counts]
               + [False] * (attempts - len(by_task[name])) for name in tasks}
    resolved, attempted = sum(map(sum, counted.values())), sum(map(len, counted.values()))
    guard: Counter[str] = Counter()
    for record in records:
        guard.update(record.guard)
    sizes = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < attempts} | {attempts})
    pass_at = {str(k): _pass_at(list(counted.values()), k) for k in sizes}
    outcomes = Counter(record.outcome for record in records)
    return {
        "resolved": resolved, "attempted": attempted, "rate": resolved / attempted if attempted else 0.0,
        "ci95": pass_at["1"]["ci95"], "attempts": attempts, "pass_at": pass_at,
        **{name: outcomes[name] for name in OUTCOMES if name != RESOLVED}, "guard": dict(sorted(guard.items())),
        "reasons": dict(sorted(Counter(record.reason for record in records if record.reason).items())),
        **{name: sum(getattr(record, name) for record in records)
           for name in ("turns", "malformed", "prompt_tokens", "completion_tokens", "retries")}}


def _pass_at(tasks: Sequence[Sequence[bool]], k: int) -> dict[str, Any]:
    """The unbiased estimate over tasks that have `k` attempts that count, with its interval."""
    values = [statistics.pass_at_k(len(found), sum(found), k) for found in tasks if len(found) >= k]
    if not values:
        return {"rate": None, "ci95": [0.0, 1.0], "tasks": 0}
    if all(value in (0.0, 1.0) for value in values):
        interval = statistics.wilson_interval(round(sum(values)), len(values))
    else:
        interval = statistics.bootstrap_interval(values)
    return {"rate": sum(values) / len(values), "ci95": list(interval), "tasks": len(values)}
