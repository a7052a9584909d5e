"""What an agent makes of failing tests: its next attempts beside those of an agent that was told nothing.

An attempt is a run of the tests; an episode that submits without one has made one attempt. Episode rows are those of
experts.metrics, with `runs` (outcome of each test run in order), `failing` (turns that ended in failing tests),
`repeated` (those of them that came again to files on which tests had failed) and `redrawn` (such turns that were drawn
once more instead, and of which nothing else tells).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax import statistics

Row = Mapping[str, Any]


def feedback(greedy: Sequence[Row], sampled: Sequence[Row]) -> dict[str, Any]:
    """Use of feedback in greedy and in sampled episodes, each with `summary`'s keys; None where there are no episodes.

    A fresh attempt is the first one of a sampled episode on the same task, which has been told nothing: for a sampled
    episode those of the others, so that nobody is compared with itself.

    Args:
      greedy: one episode a task.
      sampled: several episodes a task.
    """
    greedy, sampled = ([row for row in rows if not row["infrastructure"]] for rows in (greedy, sampled))
    firsts: dict[str, list[bool]] = {}
    for row in sampled:
        firsts.setdefault(row["instance_id"], []).append(attempts(row)[0])
    alone = [(row, firsts.get(row["instance_id"], [])) for row in greedy]
    seen: dict[str, int] = {}
    others = []
    for row in sampled:
        index = seen[row["instance_id"]] = seen.get(row["instance_id"], -1) + 1
        every = firsts[row["instance_id"]]
        others.append((row, every[:index] + every[index + 1 :]))
    return {"greedy": summary(alone), "sampled": summary(others)}


def attempts(row: Row) -> list[bool]:
    """Whether each attempt of an episode was right."""
    return list(map(bool, row.get("runs") or [row["solved"]]))


def summary(episodes: Sequence[tuple[Row, Sequence[bool]]]) -> dict[str, Any] | None:
    """Told and fresh attempts of episodes whose first attempt failed.

    Args:
      episodes: rows, each with fresh attempts on its task; those without any count for `repeated` and `gain` alone.

    Returns:
      episodes, first_failed: how many there are, and how many of them were told of a failure;
      repeated: share of failing turns behind an episode's first one that tried what had failed before;
      redrawn: turns drawn once more, an episode;
      gain: share of all episodes in which an attempt is right, less that in which the first one is;
      next: `told`, the share of episodes told of a failure whose next attempt is right (an episode that gives up is
        not), `fresh`, the share of fresh attempts that are right on the same tasks, `ratio`, and `p_value` of a
        sign-flip test over tasks;
      equal: the same for at least one right of all further attempts, and of as many fresh ones.
    """
    if not episodes:
        return None
    later = sum(max(row.get("failing", 0) - 1, 0) for row, _ in episodes)
    tries = [attempts(row) for row, _ in episodes]
    told = [(row["instance_id"], made[1:], fresh) for (row, fresh), made in zip(episodes, tries) if not made[0]]
    compared = [(task, further, fresh) for task, further, fresh in told if fresh]
    return {
        "episodes": len(episodes), "first_failed": len(told),
        "repeated": round(sum(row.get("repeated", 0) for row, _ in episodes) / later, 6) if later else None,
        "redrawn": round(sum(row.get("redrawn", 0) for row, _ in episodes) / len(episodes), 6),
        "gain": round(sum(any(made) - made[0] for made in tries) / len(tries), 6),
        "next": _beside([(task, float(bool(further[:1]) and further[0]), sum(fresh) / len(fresh))
                         for task, further, fresh in compared]),
        "equal": _beside([(task, float(any(further)), any_of(fresh, len(further)))
                          for task, further, fresh in compared]),
    }


def any_of(fresh: Sequence[bool], count: int) -> float:
    """Expected share of draws of `count` of `fresh` attempts, without replacement, that hold a right one."""
    count = min(count, len(fresh))
    return statistics.pass_at_k(len(fresh), sum(fresh), count) if count else 0.0


def _beside(pairs: Sequence[tuple[str, float, float]]) -> dict[str, Any] | None:
    """(task, told, fresh) of episodes, as means and a test over tasks."""
    if not pairs:
        return None
    told, fresh = (sum(pair[index] for pair in pairs) / len(pairs) for index in (1, 2))
    tasks: dict[str, list[float]] = {}
    for task, one, other in pairs:
        tasks.setdefault(task, []).append(one - other)
    differences = [sum(values) / len(values) for values in tasks.values()]
    return {"told": round(told, 6), "fresh": round(fresh, 6), "ratio": round(told / fresh, 3) if fresh else None,
            "p_value": statistics.sign_flip_test(differences)}
