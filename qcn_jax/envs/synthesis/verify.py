"""Whether tasks are what they claim: the gold patch resolves them, and without a patch they stay unresolved."""

import dataclasses
from collections.abc import Iterable, Iterator

from qcn_jax.envs import grading
from qcn_jax.envs.pool import EnvPool
from qcn_jax.envs.sandbox.base import PASSING, Provider, sandbox
from qcn_jax.envs.tasks import Task


@dataclasses.dataclass(frozen=True)
class Check:
    """One task's result: `problems` is empty when the task is sound."""

    instance_id: str
    problems: tuple[str, ...]
    seconds: float


def verify_task(provider: Provider, task: Task) -> Check:
    """Grades the gold patch, then runs the tests on the unpatched state; both in fresh sandboxes.

    Raises:
      SandboxError: the back end failed; nothing is said about the task.
    """
    problems = []
    if not task.FAIL_TO_PASS:
        problems.append("FAIL_TO_PASS is empty")
    verdict = grading.Grader(provider).grade(task, task.patch)
    if not verdict.resolved:
        reason = verdict.detail or "; ".join(verdict.caught or verdict.dropped or list(verdict.messages.values())[:1])
        problems.append(f"the gold patch gives {verdict.outcome}" + (f" ({reason})" if reason else ""))
    pristine = provider.files(task.repo)
    start = dict(grading.starting_changes(task, pristine))
    if task.test_patch:
        start = {**start, **grading.patches.apply_changes({**pristine, **start}, task.test_patch)}
    tests = [*task.FAIL_TO_PASS, *task.PASS_TO_PASS]
    with sandbox(provider, task.repo, start, role="grading") as place:
        run = place.run_tests(tests, timeout=task.timeout)
    passing = [name for name in task.FAIL_TO_PASS if run.outcomes.get(name) in PASSING]
    broken = [name for name in task.PASS_TO_PASS if run.outcomes.get(name) in ("failed", "error")]
    if passing:
        problems.append(f"without a patch {passing[0]} of FAIL_TO_PASS passes")
    if broken:
        problems.append(f"without a patch {broken[0]} of PASS_TO_PASS fails")
    return Check(task.instance_id, tuple(problems), round(verdict.seconds + run.seconds, 4))


def verify(pool: EnvPool, tasks: Iterable[Task]) -> Iterator[Check]:
    """Checks of all tasks, in order, from the pool's workers; their repositories must be registered."""
    return pool.map(lambda task: pool.submit(verify_task, task, repository=task.repo, deadline=900.0), tasks)
