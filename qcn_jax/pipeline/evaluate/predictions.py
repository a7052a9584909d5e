"""Predictions in SWE-bench's form: read, checked, graded.

A prediction is `{"instance_id", "model_name_or_path", "model_patch"}`, one JSON object a line.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcn_jax import files, statistics
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import SUSPECTED_EXPLOIT, Verdict
from qcn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One model's answer to one task; an empty patch is an answer, too."""

    instance_id: str
    model: str
    patch: str


def read_predictions(path: str | os.PathLike[str], tasks: Mapping[str, Task]) -> list[Prediction]:
    """Reads predictions for `tasks` (by id).

    Raises:
      UserError: a field is missing or ill-typed, an id is unknown or comes twice, or several models are mixed;
        names the file and line.
    """
    found: dict[str, Prediction] = {}
    for number, row in enumerate(files.read_jsonl(path), 1):
        where = f"{path}:{number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
        for field in ("instance_id", "model_name_or_path"):
            if not isinstance(row.get(field), str):
                raise UserError(f"{where}: field {field} is missing or not a string")
        patch = row.get("model_patch")
        if "model_patch" not in row or not isinstance(patch, str | None):
            raise UserError(f"{where}: field model_patch is missing or not a string")
        name = row["instance_id"]
        if name not in tasks:
            raise UserError(f"{where}: instance_id {name!r} is not among the tasks")
        if name in found:
            raise UserError(f"{where}: instance_id {name!r} comes a second time")
        found[name] = Prediction(name, row["model_name_or_path"], patch or "")
    models = {prediction.model for prediction in found.values()}
    if len(models) > 1:
        raise UserError(f"{path}: predictions of several models ({', '.join(sorted(models))}); one file each, please")
    return list(found.values())


def grade(predictions: Sequence[Prediction], tasks: Mapping[str, Task], pool: EnvPool,
          progress: Callable[[int], None]) -> list[Verdict]:
    """Verdicts in the order of `predictions`, every test run to its end; `progress` gets the number done."""
    return list(pool.map(lambda one: pool.grade(tasks[one.instance_id], one.patch), predictions, progress=progress))


def resolved_rate(tasks: Mapping[str, Task], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """resolved, attempted, rate and ci95 over all tasks (one without a prediction is not resolved).

    Tasks whose grading failed for reasons of the machine are left out and counted as `infrastructure`; suspected
    exploits are unresolved, and counted apart as well.
    """
    resolved = sum(verdict.resolved for verdict in verdicts)
    broken = sum(verdict.outcome == "infrastructure" for verdict in verdicts)
    exploits = sum(verdict.outcome == SUSPECTED_EXPLOIT for verdict in verdicts)
    attempted = len(tasks) - broken
    return {"resolved": resolved, "attempted": attempted, "rate": resolved / attempted if attempted else 0.0,
            "ci95": list(statistics.wilson_interval(resolved, attempted)), "infrastructure": broken,
            "suspected_exploit": exploits}
