"""What workers do with a page and somebody's patch beside running its tests: take screenshots, have it judged."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.base import Provider, Sandbox, sandbox
from qcn_jax.envs.tasks import grading, permissions
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.web import page_tests, running
from qcn_jax.envs.web.judge import Judge, Review, review
from qcn_jax.envs.web.page_tests import PageTest, Suite


def review_patch(provider: Provider, task: Task, patch: str, judge: Judge | None) -> Review:
    """Reviews a task's page with a patch applied.

    Raises:
      SandboxError: the browser fails.
      UserError: the judge's endpoint cannot be used.
      PatchError: the patch does not apply.
    """
    suite, _ = _shown(provider, task)
    with _patched(provider, task, patch) as place:
        return review(place.ask_python, suite, judge)


def screenshots(provider: Provider, task: Task, patch: str) -> tuple[bytes, bytes]:
    """PNGs of a task's page at the end of its first failing test: with the defect, and with a patch applied.

    Raises:
      SandboxError: the browser fails.
      PatchError: the patch does not apply.
    """
    suite, test = _shown(provider, task)
    found = []
    for applied in ("", patch):
        with _patched(provider, task, applied) as place:
            found += running.look(place.ask_python, suite, [test])
    return found[0].png, found[1].png


def _shown(provider: Provider, task: Task) -> tuple[Suite, PageTest]:
    """The suite with the task's first failing test, and that test."""
    suites = page_tests.suites(provider.files(task.repo))
    path, _, name = task.FAIL_TO_PASS[0].partition("::")
    return suites[path], next(test for test in suites[path].tests if test.name == name)


def _patched(provider: Provider, task: Task, patch: str) -> AbstractContextManager[Sandbox]:
    """A sandbox with the task's starting state, and what a patch may change of it."""
    pristine = provider.files(task.repo)
    start: dict[str, str | None] = dict(grading.starting_changes(task, pristine))
    if patch.strip():
        texts: Mapping[str, str] = {path: text for path, text in {**pristine, **start}.items() if text is not None}
        start |= {path: text for path, text in patches.apply_changes(texts, patch).items()
                  if not permissions.page_refusal(path)}
    return sandbox(provider, task.repo, start, role="grading")
