"""Candidates to verified tasks, by execution: tests that passed now fail, and the reverse patch fixes them.

`check` runs, for one candidate, tests that call the function it changes (survey.py knows which), and once the rest of
the suite: what still passes there belongs in PASS_TO_PASS, and what fails in FAIL_TO_PASS. Everything of the repository
runs in sandboxes.
"""

import dataclasses
import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.chat import endpoint
from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.base import PASSING, Provider, Sandbox
from qcn_jax.envs.synthesis import describe, heldout, quality, statement
from qcn_jax.envs.synthesis.candidates import Candidate, spread
from qcn_jax.envs.synthesis.survey import OBSERVE
from qcn_jax.envs.tasks import hidden, permissions
from qcn_jax.envs.tasks.schema import Task

TASK_SECONDS = 4.0  # wall limit of a task's tests, beyond ten times what they need without the defect
LEAST_SECONDS = 1.0  # of processor time that every run may use
SUITE_FACTOR = 3  # times the suite's processor seconds that a run of it may use, beyond those of a candidate's tests
MAX_SHARE = 0.5  # a defect that fails more than this share of all tests is trivially found


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a candidate: `outcome` is kept or a reason; `task` is there when kept.

    `seconds` is the time that its runs took, `cpu` the processor time of those that ended in order.
    """

    key: str
    repository: str
    kind: str
    outcome: str
    seconds: float
    cpu: float
    task: Task | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready row."""
        return {**dataclasses.asdict(self), "task": self.task and self.task.to_json()}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Verdict":
        """Reads what `to_json` gave."""
        return cls(**{**row, "task": row["task"] and Task.from_json(row["task"], "journal")})


class _Rejected(Exception):
    """The candidate is no task; the text is the outcome."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How candidates are examined.

    `timeout` is in wall seconds for one run of the candidate's tests; the limit that usually acts is one of processor
    time, in proportion to what the tests need without the defect, so that a busy machine changes no outcome. `reruns`
    further runs of the defective state must agree with the first, test by test. `statement` is a wording of describe.py
    and `characters` bound it. With `at_fault` it must tell of the defective function; otherwise it may tell of one that
    this one misleads. With `hide_tests` the failing tests are not in the starting state (hidden.py), with `held_out`
    tests that nobody sees are made (heldout.py); with `words` a model words the statement. With `tests_may_tell` a
    defect that no recorded call shows is told by what its tests say.
    Of the suite's tests beyond those that a candidate begins with, `pass_to_pass` are run, spread over its files and
    without those that are slow or wait (Survey.waiting); 0: all of them.
    """

    timeout: float = 10.0
    reruns: int = 1
    characters: int = statement.SHORT
    at_fault: bool = False
    held_out: bool = False
    words: endpoint.Endpoint | None = None
    tests_may_tell: bool = False
    pass_to_pass: int = 0
    statement: str = "observed"
    hide_tests: bool = False


def check(provider: Provider, candidate: Candidate, options: Options = Options()) -> Verdict:
    """Executes a candidate: defective state, fixed by the reverse patch, further times the defective state."""
    spent: list[tuple[float, float]] = []
    outcome, task = "kept", None
    try:
        if permissions.forbidden_lines(candidate.before_files, candidate.after_files):
            raise _Rejected("not_gradable")
        with provider.create(candidate.repository, candidate.after_files) as sandbox:
            task = _examine(sandbox, candidate, options, spent)
        if options.hide_tests:
            task = _hidden(provider, candidate, task)
    except _Rejected as rejection:
        outcome, task = str(rejection), None
    seconds, cpu = (round(sum(column), 4) for column in zip(*(spent or [(0.0, 0.0)])))
    return Verdict(candidate.key, candidate.repository, candidate.kind, outcome, seconds, cpu, task)


def _examine(sandbox: Sandbox, candidate: Candidate, options: Options, spent: list[tuple[float, float]]) -> Task:
    """The runs that decide, cheapest rejections first; `sandbox` is in the defective state."""
    timeout, parts = options.timeout, candidate.parts or (candidate.observe,)
    first = _run(sandbox, candidate, parts[0], timeout, spent)
    failing = [name for name in candidate.tests if first["outcomes"].get(name) not in PASSING]
    passing = [name for name in candidate.tests if name not in set(failing)]
    if not failing:
        raise _Rejected("survived")
    if any(name not in first["outcomes"] for name in candidate.tests) or first["test"] is None:
        raise _Rejected("broken")  # a file cannot be collected, or too many tests fail
    buggy = [first, *(_run(sandbox, candidate, part, timeout, spent, tests=part) for part in parts[1:])]
    if any(run["test"] is None for run in buggy):
        raise _Rejected("masked")  # one of several defects does not show beside the others
    gold = patches.make_diff(candidate.after_files, candidate.before_files)
    fixed_files = patches.apply_diff(candidate.after_files, gold)
    for path, text in fixed_files.items():
        sandbox.write(path, text)
    fixed = [_run(sandbox, candidate, (run["test"],), timeout, spent, always=True,
                  tests=candidate.tests if run is first else part) for run, part in zip(buggy, parts)]
    if any(fixed[0]["outcomes"].get(name) not in PASSING for name in candidate.tests):
        raise _Rejected("not_fixed")
    if any(a["again"] in PASSING or b["again"] not in PASSING for a, b in zip(buggy, fixed)):
        raise _Rejected("flaky")
    observed = [(run["test"],) for run in buggy]
    # The same state in other processes, where clocks, random values and addresses differ.
    fixed = [{**run, "calls": statement.stable(run["calls"], _run(
        sandbox, candidate, test, timeout, spent, always=True, tests=test, disturb=1)["calls"])}
        for run, test in zip(fixed, observed)]
    buggy, others = _agreeing(sandbox, candidate, buggy, passing, options, spent)
    more = _confirmed(sandbox, candidate, failing, others, fixed_files, options, spent)
    failing, passing = [*failing, *more], [*passing, *(name for name, passes in others.items() if passes)]
    if len(failing) > MAX_SHARE * candidate.suite:
        raise _Rejected("broken")
    told = _statement(sandbox, candidate, buggy, fixed, failing, gold, options)
    wanted = _unseen_calls(candidate, buggy, fixed) if options.held_out else []
    if wanted:
        sandbox.reset()
        for path, content in fixed_files.items():
            sandbox.write(path, content)
    fixed_calls = heldout.call_all(sandbox, wanted, timeout)
    task = _task(candidate, gold, failing, passing, told.observation, told.text)
    if fixed_calls:
        sandbox.reset()
        task = heldout.add(task, fixed_calls, heldout.call_all(sandbox, wanted, timeout), sandbox, fixed_files,
                           timeout)
    if options.held_out and not task.held_out_patch:
        sandbox.reset()
        task = heldout.mirrored(task, sandbox, fixed_files, timeout)
    return quality.scored(task, candidate.callers, candidate.suite, candidate.function)


def _hidden(provider: Provider, candidate: Candidate, task: Task) -> Task:
    """The task without the tests that show its defect in its starting state, where the other tests pass without them.

    Raises:
      _Rejected: cannot_hide.
    """
    pristine = provider.files(candidate.repository)
    for whole in (False, True):
        cut = hidden.without(task.FAIL_TO_PASS, pristine, whole)
        if cut is None:
            break
        there = {path: pristine[path] for path in cut}
        made = dataclasses.replace(
            task, bug_patch=patches.make_diff({**candidate.before_files, **there}, {**candidate.after_files, **cut}),
            test_patch=patches.make_diff(cut, there))
        names = hidden.left(made)
        with provider.create(candidate.repository, {**candidate.after_files, **cut}) as sandbox:
            run = sandbox.run_tests([*task.FAIL_TO_PASS, *names], task.timeout)
        if run.passed(names) and not set(task.FAIL_TO_PASS) & set(run.outcomes):
            state = _state(candidate, made.bug_patch)
            return dataclasses.replace(made, base_commit=state, environment_setup_commit=state)
    raise _Rejected("cannot_hide")


def _state(candidate: Candidate, bug: str) -> str:
    """Names a starting state."""
    return hashlib.sha256(f"{candidate.archive_sha256}\0{bug}".encode()).hexdigest()[:40]


def _agreeing(
    sandbox: Sandbox, candidate: Candidate, buggy: Sequence[dict[str, Any]], passing: Sequence[str], options: Options,
    spent: list[tuple[float, float]],
) -> tuple[list[dict[str, Any]], dict[str, bool]]:
    """The runs of the defective state, with what further runs of it confirm, and the suite's rest.

    Returns:
      The runs, and of the suite's other tests which ones pass.

    Raises:
      _Rejected: flaky, where a test ends otherwise.
    """
    marked, rest = list(buggy), _rest(candidate, options)
    others: dict[str, bool] = {}
    for number in range(max(options.reruns, bool(rest))):
        sandbox.reset()
        tests = () if number else (buggy[0]["test"],)
        again = _run(sandbox, candidate, tests, options.timeout, spent, always=True, disturb=number + 2,
                     tests=candidate.tests if number else (*candidate.tests, *rest))
        if any((again["outcomes"].get(name) in PASSING) != (name in passing) for name in candidate.tests):
            raise _Rejected("flaky")
        if number == 0:
            marked[0] = {**buggy[0], "calls": statement.stable(buggy[0]["calls"], again["calls"]),
                         "messages": {name: statement.agreed(said, again["messages"].get(name, ""))
                                      for name, said in buggy[0]["messages"].items()}}
            others = {name: again["outcomes"].get(name) in PASSING for name in rest}
    return marked, others


def _rest(candidate: Candidate, options: Options) -> list[str]:
    """Tests of the suite besides the candidate's own: all, or a sample."""
    own = set(candidate.tests)
    rest = [name for name in candidate.everything if name not in own]
    if not options.pass_to_pass:
        return rest
    return spread([name for name in rest if name not in candidate.slow], options.pass_to_pass,
                  random.Random(candidate.key))


def _confirmed(
    sandbox: Sandbox, candidate: Candidate, failing: Sequence[str], others: Mapping[str, bool],
    fixed: Mapping[str, str], options: Options, spent: list[tuple[float, float]],
) -> list[str]:
    """Of the suite's other tests that failed, those that fail again and pass once fixed, run without the rest."""
    failed = [name for name, passes in others.items() if not passes]
    if not failed:
        return []
    tests = (*failing, *failed)
    again = _run(sandbox, candidate, (), options.timeout, spent, tests=tests)
    for path, text in fixed.items():
        sandbox.write(path, text)
    right = _run(sandbox, candidate, (), options.timeout, spent, tests=tests)
    sandbox.reset()
    return [name for name in failed
            if again["outcomes"].get(name) not in PASSING and right["outcomes"].get(name) in PASSING]


def _statement(
    sandbox: Sandbox, candidate: Candidate, buggy: Sequence[Mapping[str, Any]], fixed: Sequence[Mapping[str, Any]],
    failing: Sequence[str], gold: str, options: Options,
) -> describe.Description:
    """The statement, in the wording that is asked for."""
    only = (candidate.path, candidate.function) if options.at_fault else None
    facts = describe.Facts(buggy, fixed, failing, candidate.before_files, candidate.key, options.characters,
                           options.tests_may_tell, only)
    wordings = {"observed": describe.observed, "issue": describe.issue}
    try:
        return describe.described(facts, wordings[options.statement], sandbox, gold, options.words)
    except describe.NotTold as reason:
        raise _Rejected(str(reason)) from reason


def _unseen_calls(
    candidate: Candidate, buggy: Sequence[Mapping[str, Any]], fixed: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Calls like those that misbehaved, with other arguments."""
    seen = [found for run, reference in zip(buggy, fixed)
            for found in statement.differing(run["calls"], reference["calls"])]
    return heldout.calls(seen, candidate.key)


def _run(
    sandbox: Sandbox, candidate: Candidate, observe: Sequence[str], timeout: float, spent: list[tuple[float, float]],
    always: bool = False, tests: Sequence[str] | None = None, disturb: int = 0,
) -> dict[str, Any]:
    """One run of the candidate's tests (or of `tests` alone): what observe.py returned.

    Raises:
      _Rejected: timeout, out_of_memory or crashed.
    """
    tests = candidate.tests if tests is None else tests
    # Of all tests more than MAX_SHARE would fail if those not run failed like those run.
    too_many = MAX_SHARE * candidate.suite / max(candidate.callers, 1) * len(candidate.tests)
    seconds = min(timeout, LEAST_SECONDS + 4 * candidate.seconds)
    if set(tests) - set(candidate.tests):  # the whole suite has a limit of its own
        too_many = max(too_many, MAX_SHARE * len(tests))
        seconds = seconds + SUITE_FACTOR * candidate.suite_seconds
        timeout = max(timeout, 2 * seconds)
    arguments = {"mode": "check", "tests": tests, "observe": observe, "always": always, "disturb": disturb,
                 "sources": candidate.sources, "too_many": too_many, "seconds": seconds}
    run = sandbox.run_python(OBSERVE, arguments, timeout)
    spent.append((run.seconds, run.value["cpu"] if run.value else 0.0))
    if run.status != "ok":
        raise _Rejected(run.status if run.status in ("timeout", "out_of_memory") else "crashed")
    if run.value["timeout"]:
        raise _Rejected("timeout")
    return run.value


def _task(
    candidate: Candidate, gold: str, failing: Sequence[str], passing: Sequence[str],
    observation: statement.Observation | None, text: str,
) -> Task:
    name, _, version = candidate.repository.partition("==")
    bug = patches.make_diff(candidate.before_files, candidate.after_files)
    state = _state(candidate, bug)
    share = min(1.0, (len(failing) + len(passing)) / max(len(candidate.everything), 1))  # of the suite
    return Task(
        instance_id=f"pypi__{name}.{candidate.archive_sha256[:8]}.{candidate.kind}__{candidate.key[:8]}",
        repo=candidate.repository,
        base_commit=state,
        patch=gold,
        test_patch="",
        problem_statement=text,
        FAIL_TO_PASS=tuple(failing),
        PASS_TO_PASS=tuple(passing),
        version=version,
        environment_setup_commit=state,
        strategy=candidate.strategy,
        kind=candidate.kind,
        bug_patch=bug,
        path=observation.path if observation else "",
        function=observation.function if observation else "",
        timeout=5.0 * math.ceil(  # coarse: the same on every run
            (TASK_SECONDS + 10 * candidate.seconds + SUITE_FACTOR * share * candidate.suite_seconds) / 5),
    )
