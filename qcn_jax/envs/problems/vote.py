"""Tests from inputs and independent solutions: what most of them agree on is kept."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qcn_jax.envs.problems import check
from qcn_jax.envs.problems.schema import TIMEOUT, Checks
from qcn_jax.envs.sandbox.base import Provider


def voted(provider: Provider, row: Mapping[str, Any], share: float) -> tuple[dict[str, Any], int]:
    """A problem's row with tests in place of its `inputs` and `solutions`, and how many inputs were dropped.

    An input becomes a test where more than `share` of all solutions give the same; the first solution that gives that
    on every one of them becomes the row's own, where it has none.

    Raises:
      UserError: the sandbox lacks the language.
      SandboxError: the back end failed.
    """
    inputs, solutions = row["inputs"], row["solutions"]
    checks = Checks(row.get("language", "python"), tuple(inputs), ())
    given = [check.results(provider, checks, solution, row.get("timeout", TIMEOUT)) for solution in solutions]
    tests, dropped = [], 0
    agreeing = set(range(len(solutions)))
    for number, test in enumerate(inputs):
        found = [json.dumps(values[number], sort_keys=True) for values in given]
        votes = Counter(value for value, values in zip(found, given, strict=True) if values[number] is not None)
        value, count = votes.most_common(1)[0] if votes else ("null", 0)
        if count <= share * len(solutions):
            dropped += 1
            continue
        tests.append({**test, "output" if "input" in test else "returns": json.loads(value)})
        agreeing &= {index for index, one in enumerate(found) if one == value}
    made = {key: value for key, value in row.items() if key not in ("inputs", "solutions")} | {"tests": tests}
    if agreeing and not made.get("solution"):
        made["solution"] = solutions[min(agreeing)]
    return made, dropped


def fault(row: Mapping[str, Any]) -> str:
    """What keeps a row from being voted on; "" where nothing does."""
    inputs, solutions = row.get("inputs"), row.get("solutions")
    if not isinstance(solutions, list) or len(solutions) < 3 or not all(isinstance(one, str) for one in solutions):
        return "field solutions must be a list of three texts or more"
    if not isinstance(inputs, list) or not inputs or not all(isinstance(one, dict) and (
            isinstance(one.get("input"), str) or isinstance(one.get("call"), dict)) for one in inputs):
        return "field inputs must be a list of objects with input or call"
    return ""
