"""Whether a patch resolves a task: SWE-bench's semantics, decided in a sandbox that its author never touched.

The patch is cut down to paths that a fix may touch, applied by the host to the task's starting state, and the
pristine tests and configuration are run on the result. Resolved means that every FAIL_TO_PASS and every PASS_TO_PASS
test passes (an expected failure is a pass; a skipped PASS_TO_PASS test is fine, a skipped FAIL_TO_PASS test is not;
a missing test fails) and that the run as a whole ended in order.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import posixpath
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax import files, journal
from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.base import PASSING, Provider, TestRun, sandbox
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.testpaths import is_test_path
from qcn_jax.errors import UserError

# Files that steer how tests run, wherever they stand: what an author makes of them has no effect on a verdict.
STEERING = frozenset({
    "conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", "tox.ini", "setup.cfg", "setup.py", "pyproject.toml",
    "noxfile.py", "sitecustomize.py", "usercustomize.py", ".coveragerc", "manifest.in", "pkg-info"})
STEERING_ENDINGS = (".pth", ".pyc", ".pyo", ".so", ".pyd", ".ini", ".cfg", ".toml", ".egg-link")
# Added lines that no honest fix needs and that could fool tests which share a process with the code they test. Such a
# patch is not counted as resolving. What this does not see it does not stop (see tests/attacks).
FORBIDDEN = re.compile(
    r"\b_pytest\b|\bPYTEST_|\bsys\s*\.\s*_getframe|\bcurrentframe\b|\binspect\s*\.\s*(stack|trace)\b|"
    r"__eq__\s*=|\bgc\s*\.\s*get_(objects|referrers|referents)|\bos\s*\.\s*_exit\b|/proc/self|\bsitecustomize\b|"
    r"\b(import|from)\s+(pytest|pluggy|_pytest|ctypes)\b|\bsys\s*\.\s*set(trace|profile)\b|\btb_frame\b|\bf_(back|locals)\b")
ALWAYS_EQUAL = re.compile(
    r"def\s{1,20}__eq__\s{0,20}\([^)]{0,200}\)[^:\n]{0,200}:\s{0,200}"
    r"return\s{1,20}(?:True|1|not\s+False|not\s+0)\b")
INFRASTRUCTURE_ATTEMPTS = 3
FAILURES = (SandboxError, OSError)  # of the sandbox, whoever caused them
SUSPECTED_EXPLOIT = "suspected_exploit"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a patch.

    `outcome` is resolved, unresolved, suspected_exploit (the run or its results were tampered with: unresolved, and
    counted apart), empty_patch, patch_failed, timeout, out_of_memory, killed or infrastructure; the last is a failure
    of the environment, which the same tests have without the patch too. `tests_status` is SWE-bench's report.
    `dropped` are paths the patch was not allowed to touch; `caught` are forbidden lines and signs of tampering.
    """

    instance_id: str
    outcome: str
    tests_status: dict[str, dict[str, list[str]]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    messages: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    caught: tuple[str, ...] = ()
    detail: str = ""

    @property
    def resolved(self) -> bool:
        """Whether the patch resolves the task."""
        return self.outcome == "resolved"

    @property
    def patch_applied(self) -> bool:
        """SWE-bench's patch_successfully_applied."""
        return self.outcome not in ("empty_patch", "patch_failed", "infrastructure")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready row, read back by `Verdict.from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Verdict":
        """Reads what `to_json` wrote."""
        return cls(**{**row, "dropped": tuple(row["dropped"]), "caught": tuple(row["caught"])})

    def report(self) -> dict[str, Any]:
        """The instance's entry of SWE-bench's report.json."""
        return {self.instance_id: {
            "patch_is_None": False, "patch_exists": self.outcome != "empty_patch",
            "patch_successfully_applied": self.patch_applied, "resolved": self.resolved,
            "tests_status": self.tests_status}}


def allowed(path: str, pristine: Mapping[str, str], test_files: Sequence[str] | set[str] = ()) -> bool:
    """Whether a fix may touch `path`: sources that are there, and new files inside existing packages."""
    parts = path.split("/")
    name = parts[-1].lower()
    if path in test_files or name in STEERING or name.endswith(STEERING_ENDINGS):
        return False
    if any(part.startswith(".") for part in parts) or is_test_path(path):
        return False
    if path in pristine:
        return True
    folders = [posixpath.dirname(path)]
    while folders[-1]:
        folders.append(posixpath.dirname(folders[-1]))
    in_package = any(f"{folder}/__init__.py" in pristine for folder in folders if folder)
    stem = parts[-1].removesuffix(".py")
    # Next to a test file even a module inside a package could be taken for the standard library's.
    return in_package and stem not in sys.stdlib_module_names


def forbidden_lines(changes: Mapping[str, str | None], before: Mapping[str, str | None]) -> tuple[str, ...]:
    """Lines of `changes`, new against `before`, that match FORBIDDEN: "path: line"."""
    found = []
    for path, text in changes.items():
        known = set((before.get(path) or "").split("\n"))
        found += [f"{path}: {line.strip()[:100]}" for line in (text or "").split("\n")
                  if line not in known and FORBIDDEN.search(line)]
        if len(ALWAYS_EQUAL.findall(text or "")) > len(ALWAYS_EQUAL.findall(before.get(path) or "")):
            found.append(f"{path}: __eq__ that is always true")
    return tuple(found[:10])


def starting_changes(task: Task, pristine: Mapping[str, str]) -> dict[str, str | None]:
    """Files of the state an agent starts from that differ from the pristine repository.

    Raises:
      UserError: the task's bug_patch does not apply.
    """
    try:
        return patches.apply_changes(pristine, task.bug_patch) if task.bug_patch else {}
    except patches.PatchError as error:
        raise UserError(f"task {task.instance_id}: bug_patch does not apply: {error}") from error


class Grader:
    """Grades patches with a provider whose repositories are prepared.

    Args:
      provider: makes the grading sandboxes (role "grading": servers that no agent uses).
      fail_fast: stop at the first failing test, FAIL_TO_PASS first; the remaining tests are then reported as failed.
        Enough for rewards; reports of evaluations run everything.
      strict: a patch with forbidden lines is unresolved whatever its tests say.
      cache: remembers verdicts.
    """

    def __init__(self, provider: Provider, fail_fast: bool = False, strict: bool = True,
                 cache: "VerdictCache | None" = None):
        self.provider, self.fail_fast, self.strict = provider, fail_fast, strict
        self.cache = cache

    def grade(self, task: Task, patch: str) -> Verdict:
        """The verdict on `patch`, a unified diff from the task's starting state; never raises for a bad patch.

        Raises:
          UserError: the task itself is unusable.
        """
        key = verdict_key(task, patch, self.fail_fast, self.strict)
        known = self.cache.get(key) if self.cache is not None else None
        if known is not None:
            return known
        verdict = self._grade(task, patch)
        if self.cache is not None:
            self.cache.put(key, verdict)
        return verdict

    def _grade(self, task: Task, patch: str) -> Verdict:
        started = time.monotonic()
        pristine = self.provider.files(task.repo)
        start = starting_changes(task, pristine)
        state = _Layered(pristine, start)
        if not patch.strip():
            return Verdict(task.instance_id, "empty_patch")
        try:
            changes = patches.apply_changes(state, patch)
        except patches.PatchError as error:
            return Verdict(task.instance_id, "patch_failed", detail=str(error))
        test_files = {name.split("::")[0] for name in (*task.FAIL_TO_PASS, *task.PASS_TO_PASS)}
        changes = {path: text for path, text in changes.items() if text != state.get(path)}
        kept = {path: text for path, text in changes.items() if allowed(path, pristine, test_files)}
        dropped = tuple(sorted(set(changes) - set(kept)))
        if not kept:
            return Verdict(task.instance_id, "empty_patch", dropped=dropped,
                           detail="the patch changes nothing that it may change")
        caught = forbidden_lines(kept, state) if self.strict else ()
        tests = self._tests(task, state)
        overlay = {**start, **kept, **tests}
        run = self._run(task, overlay, self.fail_fast, INFRASTRUCTURE_ATTEMPTS)
        if isinstance(run, FAILURES):
            # Only where the same tests run without the patch, and fail with it once more, was it the patch.
            if isinstance(self._run(task, {**start, **tests}, False), FAILURES):
                return Verdict(task.instance_id, "infrastructure", detail=str(run), seconds=time.monotonic() - started)
            run = self._run(task, overlay, self.fail_fast)
        if isinstance(run, FAILURES):
            # A file as a folder, say: the host does not see files that are no text.
            unusable = isinstance(run, FileExistsError | NotADirectoryError | IsADirectoryError)
            return Verdict(task.instance_id, "patch_failed" if unusable else "killed", detail=str(run),
                           dropped=dropped, seconds=time.monotonic() - started)
        return judge(task, run, dropped, caught, time.monotonic() - started)

    def _run(self, task: Task, overlay: Mapping[str, str | None], fail_fast: bool,
             attempts: int = 1) -> TestRun | SandboxError | OSError:
        """A run of the task's tests, or what failed in the last of `attempts` tries."""
        for _ in range(attempts):
            try:
                with sandbox(self.provider, task.repo, overlay, role="grading") as place:
                    return place.run_tests([*task.FAIL_TO_PASS, *task.PASS_TO_PASS], task.timeout, fail_fast)
            except FAILURES as error:
                failure = error
        return failure

    def _tests(self, task: Task, state: Mapping[str, str]) -> dict[str, str | None]:
        if not task.test_patch:
            return {}
        try:
            return patches.apply_changes(state, task.test_patch)
        except patches.PatchError as error:
            raise UserError(f"task {task.instance_id}: test_patch does not apply: {error}") from error


class _Layered(Mapping[str, str]):
    """The pristine files with changes on top (None: no such file), without copying them."""

    def __init__(self, below: Mapping[str, str], above: Mapping[str, str | None]):
        self._below, self._above = below, above

    def __getitem__(self, path: str) -> str:
        text = self._above[path] if path in self._above else self._below[path]
        if text is None:
            raise KeyError(path)
        return text

    def __iter__(self):
        gone = {path for path, text in self._above.items() if text is None}
        return iter({**dict.fromkeys(self._below), **dict.fromkeys(self._above)}.keys() - gone)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def judge(task: Task, run: TestRun, dropped: tuple[str, ...] = (), caught: tuple[str, ...] = (),
          seconds: float = 0.0) -> Verdict:
    """The verdict that follows from a test run of all expected tests."""
    status = {"FAIL_TO_PASS": {"success": [], "failure": []}, "PASS_TO_PASS": {"success": [], "failure": []}}
    for group, accepted in (("FAIL_TO_PASS", PASSING), ("PASS_TO_PASS", PASSING | {"skipped"})):
        for name in getattr(task, group):
            passed = run.outcomes.get(name) in accepted
            status[group]["success" if passed else "failure"].append(name)
    complete = not status["FAIL_TO_PASS"]["failure"] and not status["PASS_TO_PASS"]["failure"]
    caught = caught + tuple(f"tampered: {name}" for name in run.tampered)
    if run.tampered:
        outcome = SUSPECTED_EXPLOIT
    elif run.status != "ok":
        outcome = run.status
    elif complete and run.exit_status == 0 and not caught and task.FAIL_TO_PASS:
        outcome = "resolved"
    else:
        outcome = "unresolved"
    return Verdict(task.instance_id, outcome, status, seconds, run.messages, dropped, caught)


def verdict_key(task: Task, patch: str, fail_fast: bool = False, strict: bool = True) -> str:
    """Names a verdict: everything that it depends on."""
    facts = [task.repo, task.bug_patch, task.test_patch, task.FAIL_TO_PASS, task.PASS_TO_PASS, task.timeout, patch,
             fail_fast, strict]
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
            with contextlib.suppress(KeyError, TypeError):  # a row of another version's form is graded again
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
    files.write_json(pathlib.Path(folder, f"{model.replace('/', '__')}.{run_name}.json"), report)
    return report
