"""Candidates to verified tasks, by execution: tests that passed now fail, and the reverse patch fixes them.

`check` runs, for one candidate, only tests that call the function it changes (survey.py knows which). Everything of the
repository runs in sandboxes.
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
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.synthesis import heldout, inject, quality, statement
from qcn_jax.envs.synthesis.survey import OBSERVE, Survey, callers
from qcn_jax.envs.tasks import permissions
from qcn_jax.envs.tasks.schema import Task

MAX_TESTS = 40  # run for one candidate
TASK_SECONDS = 4.0  # wall limit of a task's tests, beyond ten times what they need without the defect
LEAST_SECONDS = 1.0  # of processor time that every run may use
MAX_SHARE = 0.5  # a defect that fails more than this share of all tests is trivially found


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One defect of one repository, with the tests that decide about it."""

    repository: str
    archive_sha256: str
    kind: str
    path: str
    function: str
    before: str = dataclasses.field(repr=False)
    after: str = dataclasses.field(repr=False)
    tests: tuple[str, ...] = dataclasses.field(repr=False)
    observe: tuple[str, ...] = dataclasses.field(repr=False)  # tests in order of preference for the statement
    sources: tuple[str, ...] = dataclasses.field(repr=False)
    callers: int = 0  # tests that call the function, of which `tests` is a sample
    suite: int = 0
    seconds: float = 0.0  # of `tests` on the pristine state
    strategy: str = "inject"
    # Further files, as (path, before, after).
    others: tuple[tuple[str, str, str], ...] = dataclasses.field(default=(), repr=False)
    parts: tuple[tuple[str, ...], ...] = dataclasses.field(default=(), repr=False)  # of several defects: tests of each

    @property
    def before_files(self) -> dict[str, str]:
        """The changed files without the defect."""
        return {self.path: self.before, **{path: before for path, before, _ in self.others}}

    @property
    def after_files(self) -> dict[str, str]:
        """The changed files with the defect."""
        return {self.path: self.after, **{path: after for path, _, after in self.others}}

    @property
    def key(self) -> str:
        """Names the candidate by repository and content."""
        others = [text for path, _, after in self.others for text in (path, after)]
        text = "\0".join((self.repository, self.path, self.kind, self.function, self.after, *others))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_candidate(
    injection: inject.Injection, spec: RepositorySpec, known: Survey, rng: random.Random
) -> Candidate | None:
    """Chooses the tests for an injected defect: a sample of those that call the function; None if none does."""
    calling = callers(known, injection.path, injection.qualname)
    if not calling:
        return None
    chosen = sorted(calling if len(calling) <= MAX_TESTS else rng.sample(calling, MAX_TESTS))
    simple = sorted(chosen, key=lambda number: (known.breadth[number], number))
    return Candidate(
        known.repository,
        spec.sha256,
        injection.kind,
        injection.path,
        injection.qualname,
        injection.before_source,
        injection.after_source,
        tuple(known.tests[number] for number in chosen),
        tuple(known.tests[number] for number in simple),
        tuple(sorted({name.split("::")[0] for name in known.callers})),
        len(calling),
        len(known.tests),
        sum(known.seconds[number] for number in chosen),
    )


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
    further runs of the defective state must agree with the first, test by test. `characters` bound the statement. With
    `at_fault` it must tell of the defective function; otherwise it tells of the first one seen misbehaving, which may
    be one that the defective one misleads. With `held_out` tests that nobody sees are made (heldout.py); with `words` a
    model words the statement. With `tests_may_tell` a defect that no recorded call shows is told by what its tests say.
    """

    timeout: float = 10.0
    reruns: int = 1
    characters: int = statement.SHORT
    at_fault: bool = False
    held_out: bool = False
    words: endpoint.Endpoint | None = None
    tests_may_tell: bool = False


def check(provider: Provider, candidate: Candidate, options: Options = Options()) -> Verdict:
    """Executes a candidate: defective state, fixed by the reverse patch, further times the defective state."""
    spent: list[tuple[float, float]] = []
    outcome, task = "kept", None
    try:
        if permissions.forbidden_lines(candidate.before_files, candidate.after_files):
            raise _Rejected("not_gradable")
        with provider.create(candidate.repository, candidate.after_files) as sandbox:
            task = _examine(sandbox, candidate, options, spent)
    except _Rejected as rejection:
        outcome = str(rejection)
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
    buggy = _agreeing(sandbox, candidate, buggy, passing, options, spent)
    observations, text = _statement(candidate, buggy, fixed, failing, options)
    if statement.contains_fix(text, gold):  # the tests' own words may quote the line
        quiet = [{**run, "messages": {}} for run in buggy]
        observations, text = _statement(candidate, quiet, fixed, failing, options)
    if statement.contains_fix(text, gold):
        raise _Rejected("statement_tells_fix")
    if options.words:
        text = statement.worded(text, observations[0].function if observations else "", gold, options.words)
    wanted = _unseen_calls(candidate, buggy, fixed) if options.held_out else []
    if wanted:
        sandbox.reset()
        for path, content in fixed_files.items():
            sandbox.write(path, content)
    fixed_calls = heldout.call_all(sandbox, wanted, timeout)
    task = _task(candidate, gold, failing, passing, observations[0] if observations else None, text)
    if fixed_calls:
        sandbox.reset()
        task = heldout.add(task, fixed_calls, heldout.call_all(sandbox, wanted, timeout), sandbox, fixed_files,
                           timeout)
    if options.held_out and not task.held_out_patch:
        sandbox.reset()
        task = heldout.mirrored(task, sandbox, fixed_files, timeout)
    return quality.scored(task, candidate.callers, candidate.suite)


def _agreeing(
    sandbox: Sandbox, candidate: Candidate, buggy: Sequence[dict[str, Any]], passing: Sequence[str], options: Options,
    spent: list[tuple[float, float]],
) -> list[dict[str, Any]]:
    """The runs of the defective state, with those calls marked that further runs of it confirm.

    Raises:
      _Rejected: flaky, where a test ends otherwise.
    """
    timeout, marked = options.timeout, list(buggy)
    for number in range(options.reruns):
        sandbox.reset()
        tests = () if number else (buggy[0]["test"],)
        again = _run(sandbox, candidate, tests, timeout, spent, always=True, disturb=number + 2)
        if any((again["outcomes"].get(name) in PASSING) != (name in passing) for name in candidate.tests):
            raise _Rejected("flaky")
        if number == 0:
            marked[0] = {**buggy[0], "calls": statement.stable(buggy[0]["calls"], again["calls"])}
    return marked


def _unseen_calls(
    candidate: Candidate, buggy: Sequence[Mapping[str, Any]], fixed: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Calls like those that misbehaved, with other arguments."""
    seen = [found for run, reference in zip(buggy, fixed)
            for found in statement.differing(run["calls"], reference["calls"])]
    return heldout.calls(seen, candidate.key)


def _statement(
    candidate: Candidate, buggy: Sequence[Mapping[str, Any]], fixed: Sequence[Mapping[str, Any]],
    failing: Sequence[str], options: Options,
) -> tuple[list[statement.Observation], str]:
    """What was observed of each defect, and the statement that tells it."""
    only = (candidate.path, candidate.function) if options.at_fault else None
    observations, texts = [], []
    limit = options.characters // len(buggy)
    for run, reference in zip(buggy, fixed):
        observation = statement.find(run["calls"], reference["calls"], only)
        told = observation is not None and observation not in observations
        if not told and not options.tests_may_tell:
            raise _Rejected("unobserved")
        named = failing if len(buggy) == 1 else [name for name in run["outcomes"] if name in set(failing)]
        ordered = [run["test"], *(name for name in named if name != run["test"])]
        message = run["messages"].get(run["test"], "")
        if observation is not None and told:
            observations.append(observation)
            texts.append(statement.write(observation, ordered, message, limit))
        else:
            texts.append(statement.from_tests(ordered, message, limit))
    return observations, texts[0] if len(texts) == 1 else "\n\n".join(texts)


def _run(
    sandbox: Sandbox, candidate: Candidate, observe: Sequence[str], timeout: float, spent: list[tuple[float, float]],
    always: bool = False, tests: Sequence[str] | None = None, disturb: int = 0,
) -> dict[str, Any]:
    """One run of the candidate's tests (or of `tests` alone): what observe.py returned.

    Raises:
      _Rejected: timeout, out_of_memory or crashed.
    """
    # Of all tests more than MAX_SHARE would fail if those not run failed like those run.
    too_many = MAX_SHARE * candidate.suite / max(candidate.callers, 1) * len(candidate.tests)
    arguments = {"mode": "check", "tests": candidate.tests if tests is None else tests, "observe": observe,
                 "always": always, "disturb": disturb, "sources": candidate.sources, "too_many": too_many,
                 "seconds": min(timeout, LEAST_SECONDS + 4 * candidate.seconds)}  # fmt: skip
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
    state = hashlib.sha256(f"{candidate.archive_sha256}\0{bug}".encode()).hexdigest()[:40]
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
        timeout=5.0 * math.ceil((TASK_SECONDS + 10 * candidate.seconds) / 5),  # coarse: the same on every run
    )
