"""Whether tasks are what they claim: the gold patch resolves them, and without a patch they stay unresolved."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future

from qcn_jax.envs import patches
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox.base import PASSING, Provider, sandbox
from qcn_jax.envs.synthesis import heldout, issue, quality
from qcn_jax.envs.tasks import grading
from qcn_jax.envs.tasks.schema import Task

MADE = ("inject", "rewrite", "combine")  # strategies whose statements are made by rule, or worded from these


@dataclasses.dataclass(frozen=True)
class Check:
    """One task's result: `problems` is empty when the task is valid; `flaky` says how tests were flaky (quality.py)."""

    instance_id: str
    problems: tuple[str, ...]
    seconds: float
    flaky: dict[str, str] = dataclasses.field(default_factory=dict)


def verify_task(provider: Provider, task: Task, reruns: int = 0) -> Check:
    """Grades the gold patch, then runs the tests on the unpatched state; both in fresh sandboxes.

    Held-out tests are checked in the same way. With `reruns` the tests run so many further times in both states.

    Raises:
      SandboxError: the back end failed; nothing is said about the task.
    """
    problems, seconds = _problems(provider, task)
    opinion = heldout.second_opinion(task)
    if opinion is not None and not problems:
        found, more = _problems(provider, opinion)
        problems, seconds = [f"held-out tests: {problem}" for problem in found], seconds + more
    flaky = quality.flaky_tests(provider, task, reruns) if reruns and not problems else {}
    return Check(task.instance_id, tuple(problems), round(seconds, 4), flaky)


def _problems(provider: Provider, task: Task) -> tuple[list[str], float]:
    problems = []
    if not task.problem_statement.strip():
        problems.append("problem_statement is empty")
    if not task.FAIL_TO_PASS:
        problems.append("FAIL_TO_PASS is empty")
    verdict = grading.Grader(provider).grade(task, task.patch)
    if not verdict.resolved:
        reason = verdict.detail or "; ".join(verdict.caught or verdict.dropped or list(verdict.messages.values())[:1])
        problems.append(f"the gold patch gives {verdict.outcome}" + (f" ({reason})" if reason else ""))
    if task.checks:  # without an answer nothing passes
        return problems, verdict.seconds
    pristine = provider.files(task.repo)
    start = grading.tested_changes(task, pristine)
    tests = [*task.FAIL_TO_PASS, *task.PASS_TO_PASS]
    with sandbox(provider, task.repo, start, role="grading") as place:
        run = place.run_tests(tests, timeout=task.timeout)
    if false := _falsehood(provider, task, start):
        problems.append(f"the statement is false: {false}")
    passing = [name for name in task.FAIL_TO_PASS if run.outcomes.get(name) in PASSING]
    broken = [name for name in task.PASS_TO_PASS if run.outcomes.get(name) in ("failed", "error")]
    if passing:
        problems.append(f"without a patch {passing[0]} of FAIL_TO_PASS passes")
    if broken:
        problems.append(f"without a patch {broken[0]} of PASS_TO_PASS fails")
    return problems, verdict.seconds + run.seconds


def _falsehood(provider: Provider, task: Task, start: Mapping[str, str | None]) -> str:
    """What a statement that was made by rule says and is not so."""
    programs = issue.programs(task.problem_statement) if task.strategy in MADE else []
    if not programs:
        return ""
    try:
        fixed = {**start, **patches.apply_changes(grading.Layered(provider.files(task.repo), start), task.patch)}
    except patches.PatchError:
        return ""  # told by the verdict
    results = []
    for state in (start, fixed):
        with sandbox(provider, task.repo, state) as place:
            results.append(issue.repeat(place, programs, task.timeout))
    return issue.falsehood(task.problem_statement, *results)


def verify(pool: EnvPool, tasks: Iterable[Task], reruns: int = 0) -> Iterator[Check]:
    """Checks of all tasks, in order, from the pool's workers; their repositories must be registered."""
    def submit(task: Task) -> Future:
        return pool.submit(verify_task, task, reruns, repository=task.repo, deadline=900.0 + 60.0 * reruns)

    return pool.map(submit, tasks)
