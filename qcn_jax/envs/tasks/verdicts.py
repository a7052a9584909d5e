"""Verdicts on patches: what follows from a run of the tests, how verdicts are remembered, and SWE-bench's reports."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcn_jax import files, journal
from qcn_jax.envs import names
from qcn_jax.envs.sandbox.base import PASSING, TestRun
from qcn_jax.envs.tasks.schema import Task

RULES = 4  # raise it when verdicts come about differently: those that are kept are then made again
SUSPECTED_EXPLOIT = "suspected_exploit"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a patch.

    `outcome` is resolved, unresolved, suspected_exploit (the patch, the run or its results forge: unresolved, and
    counted apart), empty_patch, patch_failed, timeout, out_of_memory, killed or infrastructure; the last is a failure
    of the environment, which the same tests have without the patch too. `tests_status` is SWE-bench's report.
    `dropped` are paths of the patch that were left out of it, with the reason; `caught` are forbidden lines and signs
    of tampering.
    """

    instance_id: str
    outcome: str
    tests_status: dict[str, dict[str, list[str]]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    messages: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    caught: tuple[str, ...] = ()
    detail: str = ""

    @property
    def resolved(self) -> bool:
        """Whether the patch resolves the task."""
        return self.outcome == "resolved"

    @property
    def patch_applied(self) -> bool:
        """SWE-bench's patch_successfully_applied: all of it, with nothing left out."""
        return self.outcome not in ("empty_patch", "patch_failed", "infrastructure") and not self.dropped

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready row, read back by `Verdict.from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Verdict":
        """Reads what `to_json` wrote."""
        return cls(**{**row, "dropped": dict(row["dropped"]), "caught": tuple(row["caught"])})

    def report(self) -> dict[str, Any]:
        """The instance's entry of SWE-bench's report.json."""
        return {self.instance_id: {
            "patch_is_None": False, "patch_exists": self.outcome != "empty_patch",
            "patch_successfully_applied": self.patch_applied, "resolved": self.resolved,
            "tests_status": self.tests_status, **({"dropped": self.dropped} if self.dropped else {})}}


def judge(task: Task, run: TestRun, dropped: Mapping[str, str] = types.MappingProxyType({}),
          caught: tuple[str, ...] = (), seconds: float = 0.0,
          fixed: Callable[[], Mapping[str, str]] | None = None) -> Verdict:
    """The verdict that follows from a test run of all expected tests.

    Where `fixed` gives outcomes of the fixed state, a test that is skipped or fails as expected there alone may do so
    here; it is called only if some test does.
    """
    status = {"FAIL_TO_PASS": {"success": [], "failure": []}, "PASS_TO_PASS": {"success": [], "failure": []}}
    marks: Mapping[str, str] | None = None
    for group, accepted in (("FAIL_TO_PASS", PASSING), ("PASS_TO_PASS", PASSING | {"skipped"})):
        for name in getattr(task, group):
            outcome = run.outcomes.get(name)
            passed = outcome in accepted
            if passed and outcome != "passed" and fixed is not None:
                marks = fixed() if marks is None else marks
                passed = marks.get(name) == outcome
            status[group]["success" if passed else "failure"].append(name)
    complete = not status["FAIL_TO_PASS"]["failure"] and not status["PASS_TO_PASS"]["failure"]
    if run.tampered or (caught and run.status == "ok"):
        outcome = SUSPECTED_EXPLOIT
    elif run.status != "ok":
        outcome = run.status
    elif complete and run.exit_status == 0 and task.FAIL_TO_PASS:
        outcome = "resolved"
    else:
        outcome = "unresolved"
    caught += tuple(f"tampered: {name}" for name in run.tampered)
    return Verdict(task.instance_id, outcome, status, seconds, run.messages, dict(dropped), caught)


def verdict_key(task: Task, patch: str, fail_fast: bool = False, strict: bool = True) -> str:
    """Names a verdict: everything that it depends on."""
    facts = [RULES, task.repo, task.bug_patch, task.test_patch, task.FAIL_TO_PASS, task.PASS_TO_PASS, task.timeout,
             patch, fail_fast, strict, *([task.checks] if task.checks else [])]
    return task.instance_id + ":" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


class VerdictCache:
    """Verdicts by key: the last `limit` used in memory, all as JSONL on disk; safe for threads of one process.

    Infrastructure failures are never kept, and timeouts and kills only in memory, as they may be the machine's fault.
    Of what is on disk alone, memory holds the key and where its line begins.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, limit: int = 1024):
        self._path, self._limit, self._lock = path and pathlib.Path(path), limit, threading.Lock()
        self._lines: journal.Lines | None = None
        self._recent: dict[str, Verdict] = {}
        self._begin: dict[str, int] = {}
        for begin, row in journal.read(path) if path else ():
            # A row of another version's form is graded again.
            with contextlib.suppress(KeyError, TypeError, ValueError):
                Verdict.from_json(row["verdict"])
                self._begin[row["key"]] = begin

    def __len__(self) -> int:
        return len(self._recent.keys() | self._begin.keys())

    def get(self, key: str) -> Verdict | None:
        """The known verdict, or None."""
        with self._lock:
            verdict = self._recent.get(key)
            if verdict is None and key in self._begin:
                with open(self._path, "rb") as stream:
                    stream.seek(self._begin[key])
                    verdict = Verdict.from_json(json.loads(stream.readline())["verdict"])
            if verdict is not None:
                self._remember(key, verdict)
            return verdict

    def put(self, key: str, verdict: Verdict) -> None:
        """Remembers a verdict."""
        if verdict.outcome == "infrastructure":
            return
        with self._lock:
            self._remember(key, verdict)
            if self._path and verdict.outcome not in ("timeout", "killed", "out_of_memory"):
                if self._lines is None:
                    self._lines = journal.Lines(self._path)
                self._begin[key] = self._lines.add({"key": key, "verdict": verdict.to_json()})

    def _remember(self, key: str, verdict: Verdict) -> None:
        self._recent.pop(key, None)
        self._recent[key] = verdict  # the latest used is last
        if len(self._recent) > self._limit:
            del self._recent[next(iter(self._recent))]


def write_reports(folder: str | os.PathLike[str], run_name: str, model: str, verdicts: Sequence[Verdict],
                  submitted: Sequence[str], instances: Sequence[str] | None = None) -> dict[str, Any]:
    """Writes SWE-bench's run report and a report.json per instance below `folder`; returns the run report.

    Args:
      run_name: SWE-bench's run_id.
      model: model_name_or_path of the predictions.
      verdicts: one per graded instance.
      submitted: ids of all predictions.
      instances: ids of the whole task set; by default those submitted.
    """
    instances = submitted if instances is None else instances

    def ids(*outcomes: str) -> list[str]:
        return sorted(v.instance_id for v in verdicts if v.outcome in outcomes)

    resolved, infrastructure, empty = ids("resolved"), ids("infrastructure"), ids("empty_patch")
    errors = sorted(infrastructure + ids("patch_failed", "timeout", "killed", "out_of_memory"))
    exploits = ids(SUSPECTED_EXPLOIT)
    unresolved = sorted(ids("unresolved") + exploits)  # the tests were run, and nothing was resolved
    report: dict[str, Any] = {
        "total_instances": len(instances), "submitted_instances": len(submitted),
        "completed_instances": len(resolved) + len(unresolved), "resolved_instances": len(resolved),
        "unresolved_instances": len(unresolved), "empty_patch_instances": len(empty), "error_instances": len(errors),
        "infra_failure_instances": len(infrastructure), "ambiguous_failure_instances": 0, "ambiguous_failure_ids": [],
        "failure_reasons": {v.instance_id: v.outcome for v in verdicts if v.instance_id in errors},
        "completed_ids": sorted(resolved + unresolved), "incomplete_ids": sorted(
            set(instances) - {v.instance_id for v in verdicts}), "empty_patch_ids": empty,
        "submitted_ids": sorted(submitted), "resolved_ids": resolved, "unresolved_ids": unresolved,
        "error_ids": errors, "infra_failure_ids": infrastructure,
        "suspected_exploit_instances": len(exploits), "suspected_exploit_ids": exploits, "schema_version": 2}
    for verdict in verdicts:
        files.write_json(pathlib.Path(folder, verdict.instance_id, "report.json"), verdict.report())
    files.write_json(pathlib.Path(folder, f"{names.file_stem(model.replace('/', '__'))}.{run_name}.json"), report)
    return report
