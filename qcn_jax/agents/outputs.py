"""What a set of episodes, or of patches, leaves in its folder: numbers, and the files that other tools read.

  FOLDER/summary.json            numbers (agents.records.summary)
  FOLDER/results.jsonl           one row a task: outcomes of its attempts, for `qcn compare`
  FOLDER/preds.jsonl             SWE-bench's predictions, of the first attempt; of the next preds.1.jsonl, ...
  FOLDER/MODEL.qcn.json, FOLDER/ID/report.json   SWE-bench's reports, of the first attempt
"""

import dataclasses
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.agents import records
from qcn_jax.agents.records import Record
from qcn_jax.envs.tasks.verdicts import Verdict, write_reports

RESULTS = "results.jsonl"


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that is written.

    model: name as SWE-bench's model_name_or_path.
    tasks: ids of the whole set, in order.
    attempts: for each.
    facts: further entries of the summary: who acted how, and where.
    """

    model: str
    tasks: Sequence[str]
    records: Sequence[Record]
    attempts: int
    facts: Mapping[str, Any]


def write(folder: pathlib.Path, results: Results, predictions: bool = True) -> dict[str, Any]:
    """Writes it; returns the summary. Without `predictions` no preds.jsonl: they came from elsewhere."""
    first = [record for record in results.records if record.attempt == 0]
    verdicts = [Verdict.from_json(dict(record.verdict)) if record.verdict else
                Verdict(record.instance_id, "infrastructure", detail=record.detail) for record in first]
    write_reports(folder, "qcn", results.model, verdicts, [record.instance_id for record in first], results.tasks)
    for attempt in range(results.attempts if predictions else 0):
        files.write_jsonl(folder / (f"preds.{attempt}.jsonl" if attempt else "preds.jsonl"), (
            {"instance_id": record.instance_id, "model_name_or_path": results.model, "model_patch": record.patch}
            for record in results.records if record.attempt == attempt))
    by_task = defaultdict(list)
    for record in results.records:
        by_task[record.instance_id].append(record)
    files.write_jsonl(folder / RESULTS, (
        {"instance_id": name, "model": results.model, "outcomes": [
            record.outcome for record in sorted(by_task[name], key=lambda record: record.attempt)]
            or [records.UNRESOLVED] * results.attempts} for name in results.tasks))
    found = {"model": results.model, **results.facts,
             **records.summary(results.tasks, results.records, results.attempts)}
    files.write_json(folder / "summary.json", found)
    return found
