"""Predictions in SWE-bench's form: read, checked, graded.

A prediction is `{"instance_id", "model_name_or_path", "model_patch"}`: one JSON object a line, or a JSON list of them,
or a JSON object that has them by instance_id (preds.json of SWE-agent and mini-swe-agent).
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from qcn_jax import files, statistics
from qcn_jax.envs import names
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.tasks.schema import Task, read_rows
from qcn_jax.envs.tasks.verdicts import SUSPECTED_EXPLOIT, Verdict
from qcn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One model's answer to one task; an empty patch is an answer, too."""

    instance_id: str
    model: str
    patch: str


def read_predictions(path: str | os.PathLike[str], tasks: Mapping[str, Task],
                     faults: list[str] | None = None) -> list[Prediction]:
    """Reads predictions for `tasks` (by id).

    Raises:
      UserError: a field is missing or ill-typed, an id is unknown or comes twice; names the file and line. Where
        `faults` is given that becomes a line of it instead, and the other rows are read. Or several models are mixed.
    """
    def read(row: Mapping[str, Any], where: str) -> Prediction:
        for field in ("instance_id", "model_name_or_path"):
            if not isinstance(row.get(field), str):
                raise UserError(f"{where}: field {field} is missing or not a string")
        patch = row.get("model_patch")
        if "model_patch" not in row or not isinstance(patch, str | None):
            raise UserError(f"{where}: field model_patch is missing or not a string")
        name = row["instance_id"]
        if name not in tasks:
            raise UserError(f"{where}: instance_id {names.shown(name)} is not among the tasks")
        return Prediction(name, row["model_name_or_path"], patch or "")

    found = read_rows(path, _rows(path, faults), read, faults)
    models = {prediction.model for prediction in found}
    if len(models) > 1:
        raise UserError(f"{path}: predictions of several models ({', '.join(sorted(models))}); one file each, please")
    return found


def _rows(path: str | os.PathLike[str], faults: list[str] | None) -> list[tuple[int, Any]]:
    """Rows with their places, of one JSON document or of one a line."""
    try:
        value = files.read_json(path)
    except UserError:
        return files.read_numbered(path, faults)
    if isinstance(value, dict) and "instance_id" not in value:
        value = [{"instance_id": name, **row} if isinstance(row, dict) else row for name, row in value.items()]
    return list(enumerate(value if isinstance(value, list) else [value], 1))


def grade(predictions: Sequence[Prediction], tasks: Mapping[str, Task], pool: EnvPool,
          progress: Callable[[int], None]) -> list[Verdict]:
    """Verdicts in the order of `predictions`, every test run to its end; `progress` gets the number done.

    A task that is itself unusable (its own patches do not apply, say) is no failure of the prediction: infrastructure.
    """
    def start(one: Prediction) -> Future[Verdict]:
        settled: Future[Verdict] = Future()

        def settle(done: Future[Verdict]) -> None:
            if done.cancelled():
                settled.cancel()
                return
            error = done.exception()
            if error is None:
                settled.set_result(done.result())
            elif isinstance(error, UserError):
                settled.set_result(Verdict(one.instance_id, "infrastructure", detail=str(error)))
            else:
                settled.set_exception(error)

        pool.grade(tasks[one.instance_id], one.patch).add_done_callback(settle)
        return settled

    return list(pool.map(start, predictions, progress=progress))


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
