"""Evaluations of the same tasks beside each other: rates with intervals, and for each pair who won where, paired.

Tasks of which either side has no attempt that counts (infrastructure) are left out of a pair, and counted.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax import files, statistics
from qcn_jax.agents import records
from qcn_jax.agents.outputs import RESULTS
from qcn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a folder of `qcn evaluate` says: outcomes of each task's attempts, of those that count."""

    name: str
    model: str
    outcomes: Mapping[str, tuple[str, ...]]

    def shares(self) -> dict[str, float]:
        """Resolved attempts of all that count, by task; without tasks of which none counts."""
        counted = {name: [one for one in found if one != records.INFRASTRUCTURE]
                   for name, found in self.outcomes.items()}
        return {name: found.count(records.RESOLVED) / len(found) for name, found in counted.items() if found}


def read(folder: str) -> Evaluation:
    """Reads a folder; raises UserError where it holds no results."""
    path = pathlib.Path(folder, RESULTS)
    if not path.is_file():
        raise UserError(f"{folder}: holds no {RESULTS}; give folders that qcn evaluate --out=DIR wrote")
    rows = files.read_jsonl(path)
    try:
        outcomes = {row["instance_id"]: tuple(row["outcomes"]) for row in rows}
        return Evaluation(folder, rows[0]["model"] if rows else "none", outcomes)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: a row has no instance_id, model and outcomes") from error


def compare(evaluations: Sequence[Evaluation], common: bool = False) -> dict[str, Any]:
    """Rates of all on the same tasks, and every pair.

    Args:
      evaluations: two or more.
      common: compare on the tasks that all have, where they do not have the same.

    Raises:
      UserError: they have different tasks and `common` is not given, or none in common.
    """
    sets = [set(one.outcomes) for one in evaluations]
    shared = set.intersection(*sets)
    for one, tasks in zip(evaluations[1:], sets[1:], strict=True):
        if (odd := tasks ^ sets[0]) and not common:
            raise UserError(f"{one.name} and {evaluations[0].name} have different tasks, such as {min(odd)}; --common "
                            f"compares on those that all have ({len(shared)})")
    if not shared:
        raise UserError("the folders have no task in common")
    kept = [dataclasses.replace(one, outcomes={name: one.outcomes[name] for name in sorted(shared)})
            for one in evaluations]
    pairs = [_pair(first, second) for first, second in itertools.combinations(kept, 2)]
    for pair, adjusted in zip(pairs, statistics.holm([pair["p_value"] for pair in pairs]), strict=True):
        pair["p_adjusted"] = adjusted
    return {"tasks": len(shared), "evaluations": [_rate(one) for one in kept], "pairs": pairs}


def _rate(one: Evaluation) -> dict[str, Any]:
    values = list(one.shares().values())
    single = all(value in (0.0, 1.0) for value in values)
    interval = (statistics.wilson_interval(round(sum(values)), len(values)) if single
                else statistics.bootstrap_interval(values))
    return {"name": one.name, "model": one.model, "tasks": len(values),
            "attempts": max(map(len, one.outcomes.values()), default=0),
            "rate": sum(values) / len(values) if values else 0.0, "ci95": list(interval),
            "infrastructure": len(one.outcomes) - len(values)}


def _pair(first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """The first against the second: McNemar's exact test of single attempts, a sign-flip test of shares."""
    a, b = first.shares(), second.shares()
    names = sorted(a.keys() & b.keys())
    differences = [a[name] - b[name] for name in names]
    won = [name for name, value in zip(names, differences, strict=True) if value > 0]
    lost = [name for name, value in zip(names, differences, strict=True) if value < 0]
    single = all(value in (-1.0, 0.0, 1.0) for value in differences)
    if not names:
        p_value, interval = 1.0, (-1.0, 1.0)
    else:
        p_value = statistics.sign_test(len(won), len(lost)) if single else statistics.sign_flip_test(differences)
        interval = statistics.bootstrap_interval(differences)
    return {"first": first.name, "second": second.name, "first_model": first.model, "second_model": second.model,
            "tasks": len(names), "won": len(won), "lost": len(lost),
            "tied": len(names) - len(won) - len(lost), "difference": sum(differences) / len(names) if names else 0.0,
            "ci95": list(interval), "p_value": p_value, "test": "McNemar, exact" if single else "sign flip",
            "left_out": len(first.outcomes) - len(names), "won_ids": won, "lost_ids": lost}


def table(found: Mapping[str, Any]) -> str:
    """Rates and pairs, for a terminal."""
    width = max(len(one["name"]) for one in found["evaluations"])
    lines = [f"{found['tasks']} tasks"]
    for one in found["evaluations"]:
        low, high = one["ci95"]
        lost = f", {one['infrastructure']} lost to infrastructure" if one["infrastructure"] else ""
        lines.append(f"{one['name']:<{width}}  {one['rate']:6.1%}  [{low:.1%}, {high:.1%}]  {one['model']}, "
                     f"{one['attempts']} a task{lost}")
    for pair in found["pairs"]:
        low, high = pair["ci95"]
        adjusted = f", adjusted {pair['p_adjusted']:.4g}" if len(found["pairs"]) > 1 else ""
        lines.append(f"{pair['first']} against {pair['second']}: won {pair['won']}, lost {pair['lost']}, tied "
                     f"{pair['tied']}; {pair['difference']:+.1%} [{low:+.1%}, {high:+.1%}]; p = {pair['p_value']:.4g}"
                     f"{adjusted} ({pair['test']})")
    return "\n".join(lines)
