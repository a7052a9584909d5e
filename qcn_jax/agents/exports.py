"""Results as other tools read them: JUnit's XML, Harbor's job folder, SWE-agent's trajectories."""

import datetime
import hashlib
import pathlib
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.agents import trajectory_files
from qcn_jax.agents.records import Record
from qcn_jax.agents.running import Folder

FORMATS = ("junit", "harbor", "swe_agent")
LONGEST_NAME = 64  # characters of a task's in those of Harbor's trials
_NAMESPACE = uuid.UUID("8f3c4c6e-2d0b-4c7e-9a57-5b1f6c0a9d11")  # of ids that are the same in every export


def export(kind: str, folder: Folder, model: str, scaffold: str, found: Sequence[Record]) -> pathlib.Path:
    """Writes one of FORMATS beside the results; returns where."""
    if kind == "junit":
        path = folder.path / "junit.xml"
        files.write_text(path, junit(model, scaffold, found))
        return path
    path = folder.path / ("harbor" if kind == "harbor" else "swe_agent")
    if kind == "harbor":
        harbor(path, model, scaffold, found)
    taken = {record.instance_id for record in found}
    for record in found:
        source = folder.trajectory(record)
        if source.exists():
            name = record.instance_id if not record.attempt else f"{record.instance_id}.{record.attempt}"
            while record.attempt and name in taken:  # another one's id
                name += "+"
            row = files.read_json(source)
            if kind == "harbor":
                files.write_json(path / _trial(record) / "agent" / "trajectory.traj.json", row)
            else:
                files.write_json(path / name / f"{name}.traj", trajectory_files.swe_agent(row))
    return path


def junit(model: str, scaffold: str, found: Sequence[Record]) -> str:
    """One test case for each episode: unresolved is a failure, infrastructure an error."""
    failures = sum(record.counts and not record.resolved for record in found)
    errors = sum(not record.counts for record in found)
    suite = ElementTree.Element("testsuite", {
        "name": _clean(model), "tests": str(len(found)), "failures": str(failures), "errors": str(errors),
        "skipped": "0", "time": f"{sum(record.seconds for record in found):.3f}"})
    for record in found:
        case = ElementTree.SubElement(suite, "testcase", {
            "classname": _clean(f"{model}.{scaffold}"), "name": _clean(f"{record.instance_id}[{record.attempt}]"),
            "time": f"{record.seconds:.3f}"})
        if not record.resolved:
            words = f"{record.outcome}" + (f", ended by {record.reason}" if record.reason else "")
            kind = "failure" if record.counts else "error"
            ElementTree.SubElement(case, kind, {"message": _clean(words), "type": record.outcome}).text = _clean(
                record.detail)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _clean(text: str) -> str:
    """Without characters that XML does not have."""
    return "".join(char for char in text if char in "\t\n" or " " <= char <= "\ud7ff" or "\ue000" <= char <= "\ufffd"
                   or char > "\uffff")


def harbor(path: pathlib.Path, model: str, scaffold: str, found: Sequence[Record]) -> None:
    """Writes a Harbor job folder (0.26): config.json and result.json of the job and of every trial, rewards."""
    now = datetime.datetime.now(datetime.UTC)
    results = [_trial_result(path, model, scaffold, record, now) for record in found]
    for record, result in zip(found, results, strict=True):
        trial = path / _trial(record)
        files.write_json(trial / "config.json", result["config"])
        files.write_json(trial / "result.json", result)
        if record.counts:
            files.write_text(trial / "verifier" / "reward.txt", f"{int(record.resolved)}\n")
    rewarded = [record for record in found if record.counts]
    names = lambda good: [_trial(record) for record in rewarded if record.resolved is good]
    key = f"{scaffold}__{model.rpartition('/')[2]}__tasks"
    files.write_json(path / "config.json", {"job_name": path.parent.name, "jobs_dir": str(path.parent)})
    files.write_json(path / "result.json", {
        "id": str(uuid.uuid5(_NAMESPACE, f"{path} {model}")), "started_at": now.isoformat(),
        "finished_at": now.isoformat(), "n_total_trials": len(found), "stats": {
            "n_completed_trials": len(found), "n_errored_trials": len(found) - len(rewarded), "evals": {key: {
                "n_trials": len(rewarded), "n_errors": len(found) - len(rewarded),
                "metrics": [{"mean": sum(record.resolved for record in rewarded) / max(len(rewarded), 1)}],
                "reward_stats": {"reward": {number: names(good) for number, good in (("1", True), ("0", False))
                                            if names(good)}},
                "exception_stats": {"InfrastructureError": lost} if (lost := [
                    _trial(record) for record in found if not record.counts]) else {}}}}})


def _trial(record: Record) -> str:
    name = record.instance_id
    if len(name) > LONGEST_NAME:  # two may begin alike
        name = f"{name[:LONGEST_NAME - 9]}.{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{name}__{record.attempt}"


def _trial_result(path: pathlib.Path, model: str, scaffold: str, record: Record, now: datetime.datetime
                  ) -> dict[str, Any]:
    provider, _, name = model.rpartition("/")
    started, ended = (now - datetime.timedelta(seconds=record.seconds)).isoformat(), now.isoformat()
    lost = None if record.counts else {
        "exception_type": "InfrastructureError", "exception_message": record.detail or record.reason,
        "exception_traceback": "", "occurred_at": ended}
    return {
        "id": str(uuid.uuid5(_NAMESPACE, f"{path} {model} {record.key}")), "task_name": record.instance_id,
        "trial_name": _trial(record), "trial_uri": (path / _trial(record)).resolve().as_uri(),
        "task_id": {"path": record.instance_id}, "source": None, "task_checksum": "",
        "config": {"task": {"path": record.instance_id}, "trial_name": _trial(record), "trials_dir": str(path),
                   "agent": {"name": scaffold, "model_name": model}},
        "agent_info": {"name": scaffold, "version": "unknown",
                       "model_info": {"name": name, "provider": provider or None}},
        "agent_result": {"n_input_tokens": record.prompt_tokens, "n_output_tokens": record.completion_tokens,
                         "metadata": {"outcome": record.outcome, "reason": record.reason, "turns": record.turns}},
        "verifier_result": {"rewards": {"reward": int(record.resolved)}} if record.counts else None,
        "exception_info": lost, "started_at": started, "finished_at": ended,
        "agent_execution": {"started_at": started, "finished_at": ended}}
