"""A repository of two files, a task in it, and a way to run its tests; shared by the tests of agents and tools."""

import atexit
import functools
import os
import pathlib
import shutil
import tempfile

from qcn_jax.agents.workspace import OverlayWorkspace, ProviderRunner, open_overlay
from qcn_jax.envs.patches import make_diff
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.sandbox.local import LocalProvider
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.tasks.schema import Task

GOOD = '''\
"""A calculator."""


class Calculator:
    def __init__(self, memory=0):
        self.memory = memory

    def clamp(self, value, low, high):
        """Puts value between low and high."""
        if not low <= high:
            raise ValueError("low > high")
        if value < low:
            return low
        return high if value > high else value


def is_even(n):
    return n % 2 == 0
'''
TESTS = '''\
import pytest

from calc.core import Calculator, is_even


def test_inside():
    assert Calculator().clamp(5, 1, 10) == 5


def test_below():
    assert Calculator().clamp(-5, 1, 10) == 1


def test_above():
    assert Calculator().clamp(50, 1, 10) == 10


def test_order():
    with pytest.raises(ValueError):
        Calculator().clamp(1, 10, 1)


def test_even():
    assert is_even(2) and not is_even(3)
'''
PRISTINE = {
    "calc/__init__.py": "",
    "calc/core.py": GOOD,
    "tests/test_core.py": TESTS,
    "README.md": "A calculator.\n",
}
PASS = tuple(f"tests/test_core.py::test_{name}" for name in ("above", "order", "even"))


def make_task(good: str = "if value < low:", bad: str = "if value > low:", function: str = "Calculator.clamp",
              fail: tuple[str, ...] = ("inside", "below", "above"), **fields) -> Task:
    """The repository with `good` replaced by `bad`."""
    assert GOOD.count(good) == 1
    buggy = {"calc/core.py": GOOD.replace(good, bad)}
    fixed = {"calc/core.py": GOOD}
    names = ("inside", "below", "above", "order", "even")
    values = {
        "instance_id": "tiny__calc.1", "repo": "tiny==1", "base_commit": "0", "test_patch": "",
        "patch": make_diff(buggy, fixed), "bug_patch": make_diff(fixed, buggy),
        "problem_statement": "Calculator().clamp(5, 1, 10) gives 1, expected 5.",
        "FAIL_TO_PASS": tuple(f"tests/test_core.py::test_{n}" for n in names if n in fail),
        "PASS_TO_PASS": tuple(f"tests/test_core.py::test_{n}" for n in names if n not in fail),
        "path": "calc/core.py", "function": function,
    }
    return Task(**values | fields)


def write_tree(folder: pathlib.Path, files=PRISTINE) -> pathlib.Path:
    """Writes files below `folder`."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@functools.cache
def provider() -> LocalProvider:
    """A provider that has the repository prepared; one per test process."""
    folder = tempfile.mkdtemp(prefix="tiny-")
    os.chmod(folder, 0o755)
    atexit.register(shutil.rmtree, folder, True)
    made = LocalProvider(f"{folder}/state")
    atexit.register(made.close)
    made.prepare(spec())
    return made


@functools.cache
def spec() -> RepositorySpec:
    """The repository, written to a folder of its own."""
    folder = tempfile.mkdtemp(prefix="tiny-")
    atexit.register(shutil.rmtree, folder, True)
    return RepositorySpec("tiny==1", str(write_tree(pathlib.Path(folder))))


def run_tests(changed, node_ids, timeout, fail_fast) -> TestRun:
    """A TestRunner: a fresh sandbox for each run."""
    return ProviderRunner(provider(), "tiny==1")(changed, node_ids, timeout, fail_fast)


def overlay(task: Task, runner=run_tests) -> OverlayWorkspace:
    """The task's starting state in memory."""
    return open_overlay(task, PRISTINE, runner)
