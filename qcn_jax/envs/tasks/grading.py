"""Whether a patch resolves a task: SWE-bench's semantics, decided in a sandbox that its author never touched.

The patch is cut down to paths that a fix may touch (permissions.py), applied by the host to the task's starting state,
and the pristine tests and configuration are run on the result, in files that tested code cannot change. Resolved means
that every FAIL_TO_PASS and every PASS_TO_PASS test passes (one that is expected to fail, or is skipped, in the fixed
state may do so here; a missing test fails), that the run as a whole ended in order, and that a second opinion agrees,
for which the tests are rewritten so that their process does not know what they expect (opinion.py, withheld.py). Pages
(envs/web) share no process with their tests and need none.
"""

import dataclasses
import random
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.base import Provider, TestRun, sandbox
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks import opinion, permissions, suite
from qcn_jax.envs.tasks.schema import PAGES, Task
from qcn_jax.envs.tasks.verdicts import SUSPECTED_EXPLOIT, Verdict, VerdictCache, judge, verdict_key
from qcn_jax.envs.testpaths import is_doctest
from qcn_jax.errors import UserError

INFRASTRUCTURE_ATTEMPTS = 3
FIRST_FAILING = 5  # of FAIL_TO_PASS, run beforehand: what mends nothing fails some of them
FIRST_PART = 40  # of PASS_TO_PASS, of which synthesis puts the tests first that the change can break
SHORT = 4 * FIRST_PART  # of tests: so many are run at once rather than in two parts
FAILURES = (SandboxError, OSError)  # of the sandbox, whoever caused them
KEPT = 4096  # of each of these
_SUITES: dict[tuple[str, frozenset[str]], suite.Suite] = {}  # by prepared repository and the paths of a fix
_FIXED: dict[str, Mapping[str, str]] = {}  # outcomes of fixed states, by `opinion.key`


def _keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Remembers a value, and forgets the oldest where there are too many."""
    if len(known) >= KEPT:
        known.pop(next(iter(known)), None)
    known[key] = value


def starting_changes(task: Task, pristine: Mapping[str, str]) -> dict[str, str | None]:
    """Files of the state an agent starts from that differ from the pristine repository.

    Raises:
      UserError: the task's bug_patch does not apply.
    """
    try:
        return patches.apply_changes(pristine, task.bug_patch) if task.bug_patch else {}
    except patches.PatchError as error:
        raise UserError(f"task {task.instance_id}: bug_patch does not apply: {error}") from error


def tested_changes(task: Task, pristine: Mapping[str, str]) -> dict[str, str | None]:
    """Likewise of the state in which an unpatched task is tested: with its tests.

    Raises:
      UserError: bug_patch or test_patch does not apply.
    """
    start = starting_changes(task, pristine)
    return {**start, **_test_changes(task, Layered(pristine, start))}


def _test_changes(task: Task, state: Mapping[str, str]) -> dict[str, str | None]:
    if not task.test_patch:
        return {}
    try:
        return patches.apply_changes(state, task.test_patch)
    except patches.PatchError as error:
        raise UserError(f"task {task.instance_id}: test_patch does not apply: {error}") from error


class Grader:
    """Grades patches with a provider whose repositories are prepared.

    Args:
      provider: makes the grading sandboxes (role "grading": servers that no agent uses).
      fail_fast: run a part first and stop at its first failing test; the remaining tests are then reported as failed.
        The part are FIRST_FAILING of FAIL_TO_PASS, or, where all tests are more than SHORT, all of FAIL_TO_PASS and
        FIRST_PART of PASS_TO_PASS; all tests run only if it passes. Enough for rewards; reports of evaluations run
        everything.
      strict: a patch with forbidden lines is a suspected exploit whatever its tests say.
      cache: remembers verdicts.
    """

    def __init__(self, provider: Provider, fail_fast: bool = False, strict: bool = True,
                 cache: VerdictCache | None = None):
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
        if task.checks:
            return self._check(task, patch)
        started = time.monotonic()
        pristine = self.provider.files(task.repo)
        start = starting_changes(task, pristine)
        state = Layered(pristine, start)
        if not patch.strip():
            return Verdict(task.instance_id, "empty_patch")
        unfit: dict[str, str] = {}
        try:
            changes = patches.apply_changes(state, patches.parse(patch, unfit))
        except patches.PatchError as error:
            return Verdict(task.instance_id, "patch_failed", detail=str(error))
        test_files = {name.split("::")[0] for name in (*task.FAIL_TO_PASS, *task.PASS_TO_PASS)
                      if not is_doctest(name)}
        changes = {path: text for path, text in changes.items() if text != state.get(path)}
        refused = self._refused(task, pristine, changes, test_files)
        kept = {path: text for path, text in changes.items() if path not in refused}
        forged = () if task.language == PAGES else permissions.forged_files(changes, state, sorted(refused))
        dropped = {**unfit, **refused}
        if not kept:
            return Verdict(task.instance_id, SUSPECTED_EXPLOIT if forged else "empty_patch", dropped=dropped,
                           caught=forged, detail="the patch changes nothing that it may change")
        words = permissions.driver_words if task.language == PAGES else permissions.forbidden_lines
        caught = words(kept, state) if self.strict else ()
        tests = _test_changes(task, state)
        overlay = {**start, **kept, **tests}
        submission = _Submission(task, Layered(state, {**kept, **tests}), overlay, tests, dropped, caught)
        try:
            verdict = self._examine(submission)
        except FAILURES as failure:
            verdict = self._examine_again(submission, {**start, **tests}, str(failure))
        if verdict.outcome == "unresolved" and forged:
            verdict = dataclasses.replace(verdict, outcome=SUSPECTED_EXPLOIT)
        return dataclasses.replace(verdict, seconds=time.monotonic() - started, caught=verdict.caught + forged)

    def _check(self, task: Task, patch: str) -> Verdict:
        """The verdict on an answer to a problem."""
        from qcn_jax.envs.problems import check  # which knows tasks and verdicts

        for left in reversed(range(INFRASTRUCTURE_ATTEMPTS)):
            try:
                return check.grade(self.provider, task, patch, self.fail_fast)
            except SandboxError as failure:
                if not left:
                    return Verdict(task.instance_id, "infrastructure", detail=str(failure))
        raise AssertionError

    def _refused(self, task: Task, pristine: Mapping[str, str], changes: Mapping[str, str | None],
                 test_files: Collection[str]) -> dict[str, str]:
        """Files of a patch that it may not touch, with the reason."""
        if task.language == PAGES:
            return {path: why for path in changes if (why := permissions.page_refusal(path))}
        of_suite = self._suite(task, pristine)
        removed = {path for path, text in changes.items() if text is None}
        return {path: why for path in changes
                if (why := permissions.refusal(path, pristine, test_files, of_suite, removed))}

    def _examine(self, given: "_Submission") -> Verdict:
        """The verdict of the tests, and of a second opinion where they all pass; raises FAILURES."""
        if self.fail_fast:
            part = _first_part(given.task)
            run = self._run(part, given.overlay, True, INFRASTRUCTURE_ATTEMPTS)
            promising = judge(part, run, given.dropped, given.caught, fixed=lambda: self._fixed(given)).resolved
        if not self.fail_fast or promising and part != given.task:
            run = self._run(given.task, given.overlay, attempts=INFRASTRUCTURE_ATTEMPTS)
        verdict = judge(given.task, run, given.dropped, given.caught, fixed=lambda: self._fixed(given))
        # A page shares no process with its tests.
        return self._second(given, verdict, run) if verdict.resolved and given.task.language != PAGES else verdict

    def _examine_again(self, given: "_Submission", start: Mapping[str, str | None], failure: str) -> Verdict:
        """The verdict where the sandbox failed: the patch's doing only if the tests run without it, and fail again."""
        try:
            self._run(given.task, start)
        except FAILURES:
            return Verdict(given.task.instance_id, "infrastructure", detail=failure)
        try:
            return self._examine(given)
        except FAILURES as again:
            # A file as a folder, say: the host does not see files that are no text.
            unusable = isinstance(again, FileExistsError | NotADirectoryError | IsADirectoryError)
            return Verdict(given.task.instance_id, "patch_failed" if unusable else "killed", detail=str(again),
                           dropped=dict(given.dropped))

    def _run(self, task: Task, overlay: Mapping[str, str | None], fail_fast: bool = False, attempts: int = 1,
             names: Sequence[str] = (), evidence: bool | str = False) -> TestRun:
        """A run of the task's tests, or of `names`; raises what failed in the last of `attempts` tries."""
        for left in reversed(range(attempts)):
            try:
                with sandbox(self.provider, task.repo, overlay, role="grading") as place:
                    run = place.run_tests(names or [*task.FAIL_TO_PASS, *task.PASS_TO_PASS], task.timeout, fail_fast,
                                          evidence)
                    return self._excused(task, run)
            except FAILURES:
                if not left:
                    raise
        raise AssertionError

    def _excused(self, task: Task, run: TestRun) -> TestRun:
        """A run without such signs of tampering as the repository's own first run shows."""
        prepared = self.provider.prepared.get(task.repo) if run.tampered else None
        own = set(prepared.baseline.tampered) if prepared is not None else ()
        return dataclasses.replace(run, tampered=tuple(  # functions only; others have words for names
            name for name in run.tampered if name not in own or " " in name or "." not in name))

    def _fixed_state(self, given: "_Submission") -> dict[str, str | None]:
        """What differs from the pristine repository where the task is solved."""
        pristine = self.provider.files(given.task.repo)
        start = starting_changes(given.task, pristine)
        try:
            gold = patches.apply_changes(Layered(pristine, start), given.task.patch)
        except patches.PatchError as error:
            raise UserError(f"task {given.task.instance_id}: patch does not apply: {error}") from error
        return {**start, **gold, **given.tests}

    def _fixed(self, given: "_Submission") -> Mapping[str, str]:
        """Outcomes of the task's tests in its fixed state."""
        task, pristine = given.task, self.provider.files(given.task.repo)
        known = self.provider.prepared[task.repo].baseline.outcomes
        fixed = self._fixed_state(given)
        if all(pristine.get(path) == text for path, text in fixed.items()) and known.keys() >= {
                *task.FAIL_TO_PASS, *task.PASS_TO_PASS}:
            return known
        key = opinion.key(task, self.provider.prepared[task.repo].key)
        if key not in _FIXED:
            _keep(_FIXED, key, self._run(task, fixed, attempts=INFRASTRUCTURE_ATTEMPTS).outcomes)
        return _FIXED[key]

    def _second(self, given: "_Submission", verdict: Verdict, run: TestRun) -> Verdict:
        """The verdict of a second opinion on a patch that resolves (opinion.py)."""
        task, secret = given.task, random.SystemRandom()

        def run_tests(changes: Mapping[str, str | None], names: Sequence[str], blind: bool) -> TestRun:
            return self._run(task, changes, attempts=INFRASTRUCTURE_ATTEMPTS, names=names,
                             evidence="blind" if blind else True)

        key = opinion.key(task, self.provider.prepared[task.repo].key)
        reference = opinion.load(self.provider.state_dir, key)
        if reference is None:
            tests = opinion.draw(task, {name for name, outcome in run.outcomes.items() if outcome == "passed"}, secret)
            if task.patch.strip():
                fixed = self._fixed_state(given)
                pristine = self.provider.files(task.repo)
                helpers = suite.helpers({name.split("::")[0] for name in tests}, pristine, self._suite(task, pristine))
                reference = opinion.learn(tests, Layered(pristine, fixed), fixed, helpers, run_tests, secret)
            else:
                reference = opinion.untaught(tests)
            opinion.store(self.provider.state_dir, key, reference)
        found = opinion.ask(reference, given.state, given.overlay, run_tests, secret)
        caught = tuple(f"second opinion: {words}" for words in (*found.forged, *found.failed)[:10])
        outcome = (SUSPECTED_EXPLOIT if found.forged else "unresolved" if found.failed
                   else verdict.outcome if found.status == "ok" else found.status)
        return dataclasses.replace(verdict, outcome=outcome, caught=verdict.caught + caught)

    def _suite(self, task: Task, pristine: Mapping[str, str]) -> suite.Suite | None:
        """What of the repository tests the package; None where the task's fix is not known."""
        fix = {path for diff in (task.patch, task.bug_patch) if diff.strip() for path in patches.touched(diff)}
        fix -= set(patches.touched(task.test_patch)) if task.test_patch.strip() else set()
        if not fix:
            return None
        prepared = self.provider.prepared.get(task.repo)
        if prepared is None:
            return suite.find(fix, pristine)
        key = (prepared.key, frozenset(fix))
        if key not in _SUITES:
            _keep(_SUITES, key, suite.find(fix, pristine, prepared.settings.get("opened", ()),
                                           prepared.spec.python_path or ()))
        return _SUITES[key]


def _first_part(task: Task) -> Task:
    """The task with the tests alone that are run first."""
    if len(task.FAIL_TO_PASS) + len(task.PASS_TO_PASS) > SHORT:
        return dataclasses.replace(task, PASS_TO_PASS=task.PASS_TO_PASS[:FIRST_PART])
    return dataclasses.replace(task, FAIL_TO_PASS=task.FAIL_TO_PASS[:FIRST_FAILING], PASS_TO_PASS=())


@dataclasses.dataclass(frozen=True)
class _Submission:
    """A patch as it is examined: `state` are the files with it and the tests, `overlay` what differs from pristine."""

    task: Task
    state: Mapping[str, str]
    overlay: Mapping[str, str | None]
    tests: Mapping[str, str | None]
    dropped: Mapping[str, str]
    caught: tuple[str, ...]


class Layered(Mapping[str, str]):
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
