"""From episodes to the numbers of a model. Plain data in, plain data out; nothing here runs anything.

An episode row is a JSON object: `instance_id`, `kind` (of the bug), `solved`, `infrastructure` (no verdict, for a
reason that is not the model's), `turns`, `malformed` (how many of them broke the format), `attempts` (how often the
tests were run), `reason` (why the episode ended), `suspected_exploit` (its patch seems to forge a verdict), `guard`
(agents.guard's counts, where it had a shell).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax import statistics

Row = Mapping[str, Any]
MAX_ATTEMPTS = 6  # points of the curve over attempts: as many as an episode of eight turns with a view and a submission
PASS_K = 8  # the k of summary.json's pass_at_8


def proportion(successes: int, attempts: int) -> dict[str, Any]:
    """resolved, attempted, rate and its 95 % interval; the rate of nothing is 0."""
    low, high = statistics.wilson_interval(successes, attempts)
    return {"resolved": successes, "attempted": attempts,
            "rate": round(successes / attempts, 6) if attempts else 0.0, "ci95": [round(low, 6), round(high, 6)]}


def greedy(rows: Sequence[Row]) -> dict[str, Any]:
    """Numbers of one greedy episode a task; episodes without a verdict are counted apart and left out of rates."""
    counted = [row for row in rows if not row["infrastructure"]]
    solved = [row for row in counted if row["solved"]]
    turns = sum(row["turns"] for row in counted)
    return proportion(len(solved), len(counted)) | {
        "kinds": _by_kind(counted),
        "attempts": attempts_curve(counted),
        "mean_turns": round(turns / len(counted), 3) if counted else None,
        "valid_turns": round(1 - sum(row["malformed"] for row in counted) / turns, 6) if turns else 0.0,
        "outcomes": dict(Counter(row["reason"] for row in counted)) | {"infrastructure": len(rows) - len(counted)},
        "guard": dict(sum((Counter(row.get("guard", {})) for row in rows), Counter())),
        "suspected_exploits": [row["instance_id"] for row in counted if row.get("suspected_exploit")],
        "solved": {row["instance_id"]: bool(row["solved"]) for row in counted},
    }


def attempts_curve(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Share resolved by episodes that ran the tests at most 1, 2, ... times; a blind submission is one attempt."""
    return [{"attempts": limit} | proportion(sum(row["solved"] and max(row["attempts"], 1) <= limit for row in rows),
                                             len(rows)) for limit in range(1, MAX_ATTEMPTS + 1)]


def sampled(rows: Sequence[Row]) -> dict[str, Any]:
    """pass@k for k = 1, 2, 4, 8 over several sampled episodes a task, each a mean of unbiased estimates.

    Tasks whose episodes without a verdict leave fewer than k samples do not count for that k; `pass_at_8` is None
    where no task has 8. `sampled_solved` holds [solved, samples] of each task.
    """
    by_task: dict[str, list[bool]] = {}
    for row in rows:
        if not row["infrastructure"]:
            by_task.setdefault(row["instance_id"], []).append(bool(row["solved"]))
    result: dict[str, Any] = {"sampled_tasks": len(by_task),
                              "sampled_solved": {task: [sum(found), len(found)] for task, found in by_task.items()}}
    for k in (1, 2, 4, PASS_K):
        values = [statistics.pass_at_k(len(found), sum(found), k) for found in by_task.values() if len(found) >= k]
        result[f"pass_at_{k}"] = round(sum(values) / len(values), 6) if values else None
        if k == PASS_K and values:
            result["pass_at_8_ci95"] = [round(end, 6) for end in statistics.bootstrap_interval(values)]
    return result


def _by_kind(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    attempted = Counter(row["kind"] for row in rows)
    resolved = Counter(row["kind"] for row in rows if row["solved"])
    return {kind: {"resolved": resolved[kind], "attempted": attempted[kind]} for kind in sorted(attempted)}
