"""A failing test of somebody's repository as a task: no known fix, only the test that must pass and those that do."""

import hashlib
from collections.abc import Collection, Mapping, Sequence

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.base import PASSING, TestRun
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError

_FAILING = ("failed", "error")
LEAST_SECONDS, FACTOR = 30.0, 5.0  # of a run of the tests, against what they took at first
SHOWN = 1500  # characters of what a failing test says


def task_of(name: str, pristine: TestRun, asked: Sequence[str]) -> Task:
    """The task to make tests pass.

    Args:
      name: of the repository.
      pristine: all its tests as it is.
      asked: ids of tests, or of files and classes, of which those count that fail.

    Raises:
      UserError: there is no such test, or none of them fails.
    """
    failing: list[str] = []
    for one in asked:
        found = [test for test in pristine.outcomes if test == one or test.startswith((f"{one}::", f"{one}["))]
        broken = pristine.outcomes.get(one.split("::")[0])  # a file that cannot be collected stands under its path
        if not found and broken == "error" and "::" in one:
            found = [one]
        if not found:
            near = sorted(test for test, outcome in pristine.outcomes.items() if outcome in _FAILING)[:3]
            words = f"; tests that fail: {', '.join(near)}" if near else "; no test fails"
            raise UserError(f"--test={one}: the repository has no such test{words}")
        failing += [test for test in found if pristine.outcomes.get(test, "error") in _FAILING and "::" in test]
    if not failing:
        raise UserError(f"--test={asked[0]}: passes already, or is a file that pytest cannot read; name a test that "
                        "fails")
    keep = [test for test, outcome in pristine.outcomes.items() if outcome in PASSING and test not in failing]
    digest = hashlib.sha256(repr((name, failing)).encode()).hexdigest()[:8]
    return Task(
        instance_id=f"fix.{digest}", repo=name, base_commit="", patch="", test_patch="",
        problem_statement=_statement(failing, pristine.messages), FAIL_TO_PASS=tuple(dict.fromkeys(failing)),
        PASS_TO_PASS=tuple(keep), strategy="fix", timeout=max(LEAST_SECONDS, FACTOR * pristine.seconds))


def graded_part(patch: str, dropped: Collection[str], pristine: Mapping[str, str]) -> str:
    """What of a patch was graded: without the paths that were left out, of which nobody knows what they do."""
    changes = patches.apply_changes(pristine, patches.parse(patch, {}))
    kept = {path: text for path, text in changes.items() if path not in dropped and text != pristine.get(path)}
    return patches.make_diff({path: pristine.get(path) for path in kept}, kept)


def _statement(failing: Sequence[str], messages: Mapping[str, str]) -> str:
    lines = [f"{'This test fails' if len(failing) == 1 else 'These tests fail'}, and must pass:", *failing[:20]]
    said = next((messages[key] for test in failing for key in (test, test.split("::")[0]) if messages.get(key)), "")
    if said:
        lines += ["", "What it says:", said[-SHOWN:]]
    return "\n".join([*lines, "", "Tests that pass now must still pass."])
