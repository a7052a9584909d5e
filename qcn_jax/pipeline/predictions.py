"""Predictions in SWE-bench's form, graded, and reported in the form of SWE-bench's run report.

A prediction is `{"instance_id", "model_name_or_path", "model_patch"}`, one JSON object a line. The run report has
SWE-bench's keys (schema_version 2, with release 5's infrastructure failures), and the rate with its interval beside.
"""

import concurrent.futures
import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.envs.tasks import Task
from qcn_jax.errors import UserError
from qcn_jax.pipeline import statistics

# Outcomes of grading for which SWE-bench's harness has no report either, and counts an error.
_ERRORS = ("patch_failed", "timeout", "out_of_memory", "killed")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One model's answer to one task; an empty patch is an answer, too."""

    instance_id: str
    model: str
    patch: str


def read_predictions(path: str, tasks: Mapping[str, Task]) -> list[Prediction]:
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


def grade_predictions(predictions: Sequence[Prediction], tasks: Mapping[str, Task], grade: Callable[[Task, str], Any],
                      workers: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Verdicts by instance id; `grade` is called from `workers` threads, `progress` after each verdict."""
    verdicts: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(workers, "grade") as threads:
        pending = {threads.submit(grade, tasks[one.instance_id], one.patch): one for one in predictions}
        try:
            for future in concurrent.futures.as_completed(pending):
                verdicts[pending[future].instance_id] = future.result()
                progress(len(verdicts), len(predictions))
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
    return verdicts


def run_report(tasks: Mapping[str, Task], predictions: Sequence[Prediction],
               verdicts: Mapping[str, Any]) -> dict[str, Any]:
    """SWE-bench's run report: counts and sorted id lists; `rate` is resolved over all tasks but those that failed for
    reasons of the infrastructure."""
    outcomes = {one.instance_id: verdicts[one.instance_id].outcome for one in predictions}

    def ids(*wanted: str) -> list[str]:
        return sorted(name for name, outcome in outcomes.items() if outcome in wanted)

    groups = {
        "submitted": sorted(outcomes), "completed": ids("resolved", "unresolved"), "resolved": ids("resolved"),
        "unresolved": ids("unresolved"), "empty_patch": ids("empty_patch"), "error": ids(*_ERRORS),
        "infra_failure": ids("infrastructure"),
    }
    counted = len(tasks) - len(groups["infra_failure"])
    low, high = statistics.wilson_interval(len(groups["resolved"]), counted)
    report: dict[str, Any] = {"total_instances": len(tasks)}
    report |= {f"{name}_instances": len(group) for name, group in groups.items()}
    report |= {f"{name}_ids": group for name, group in groups.items()}
    report["incomplete_ids"] = sorted(tasks.keys() - outcomes.keys())
    rate = len(groups["resolved"]) / counted if counted else 0.0
    return report | {"schema_version": 2, "rate": rate, "ci95": [low, high]}


def write_reports(folder: pathlib.Path, report: Mapping[str, Any], predictions: Sequence[Prediction],
                  verdicts: Mapping[str, Any]) -> None:
    """Writes `report.json` and, as SWE-bench does, `logs/<model>/<instance>/report.json` for each prediction."""
    for one in predictions:
        verdict = verdicts[one.instance_id]
        row = {
            "patch_is_None": False, "patch_exists": bool(one.patch.strip()),
            "patch_successfully_applied": verdict.outcome not in ("empty_patch", "patch_failed", "infrastructure"),
            "resolved": verdict.resolved, "outcome": verdict.outcome, "tests_status": verdict.tests_status,
        }
        path = folder / "logs" / _file_name(one.model) / _file_name(one.instance_id) / "report.json"
        files.write_json(path, {one.instance_id: row})
    files.write_json(folder / "report.json", dict(report))


def _file_name(name: str) -> str:
    """`name` as one component of a path, whatever it holds; "/" becomes "__" as in SWE-bench."""
    return re.sub(r"[^\w.=+@-]+", "__", name).lstrip(".") or "unnamed"
