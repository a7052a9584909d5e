"""What tests of sandboxes share: a small repository with leftovers that hold its fix, a task in it, providers."""

import dataclasses
import pathlib
import subprocess
from typing import Any

import pytest

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import Limits, Provider, RepositorySpec
from qcn_jax.envs.sandbox.docker import DockerProvider
from qcn_jax.envs.sandbox.local import LocalProvider
from qcn_jax.envs.tasks.schema import Task

LIMITS = Limits(memory_mb=512, processes=48, disk_mb=96, file_mb=16)
# Stands in the repaired function only: wherever an agent can find it, the fix is given away.
MARKER = "repaired-4c1f0e7d"

CALC = f'''"""A calculator."""


def clamp(value, low, high):
    """Puts value between low and high."""
    if low > high:
        raise ValueError("{MARKER}")
    return max(low, min(value, high))


def mean(values):
    """The arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)
'''
BROKEN = CALC.replace(f'        raise ValueError("{MARKER}")\n', "        low, high = high, low\n").replace(
    "max(low, min(value, high))", "min(low, min(value, high))")
TESTS = '''import unittest

import pytest

from victim.calc import clamp, mean


def test_clamp_inside():
    assert clamp(5, 0, 10) == 5


def test_clamp_below():
    assert clamp(-5, 0, 10) == 0


@pytest.mark.parametrize("value", [1, 2])
def test_clamp_order(value):
    with pytest.raises(ValueError):
        clamp(value, 10, 0)


def test_mean():
    assert mean([1, 2, 3]) == 2


@pytest.mark.xfail
def test_expected_failure():
    assert mean([]) == 0


@pytest.mark.skip(reason="never")
def test_skipped():
    raise AssertionError


class Old(unittest.TestCase):
    def test_mean(self):
        for values, right in (([2, 4], 3), ([1], 1)):
            with self.subTest(values=values):
                self.assertEqual(mean(values), right)
'''
FILE = "tests/test_calc.py"
FAILING = tuple(f"{FILE}::{name}" for name in (
    "test_clamp_inside", "test_clamp_below", "test_clamp_order[1]", "test_clamp_order[2]"))
PASSING = tuple(f"{FILE}::{name}" for name in ("test_mean", "test_expected_failure", "test_skipped", "Old::test_mean"))
SOURCE = "victim/calc.py"


def write_repository(folder: pathlib.Path) -> pathlib.Path:
    """A checkout as careless builders leave it: history, byte code, build results and egg-info that hold the fix."""
    contents = {
        "victim/__init__.py": "", SOURCE: CALC, "tests/test_calc.py": TESTS, "tests/conftest.py": "", "README.md": "x\n",
        "pytest.ini": "[pytest]\naddopts = -ra\n", "PKG-INFO": "Metadata-Version: 2.1\nName: victim\nVersion: 1.2.3\n",
        "build/lib/victim/calc.py": CALC, "dist/victim.txt": CALC, ".tox/x.py": CALC, "victim/calc.py.orig": CALC}
    for path, text in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (folder / "victim" / "__pycache__").mkdir()
    (folder / "victim" / "__pycache__" / "calc.cpython-311.pyc").write_bytes(MARKER.encode())
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "the fix"], ["tag", "v1"],
                    ["remote", "add", "origin", "https://github.com/a/victim"]):
        subprocess.run([*git, *command], check=True)
    return folder


def make_task() -> Task:
    """The task: the repository with BROKEN in place of its calculator."""
    bug = patches.make_diff({SOURCE: CALC}, {SOURCE: BROKEN})
    return Task("victim__1", "victim==1.2.3", "", patches.reverse(bug), "", "clamp is wrong", FAILING, PASSING,
                bug_patch=bug, path=SOURCE, function="clamp", timeout=20.0)


@dataclasses.dataclass(frozen=True)
class World:
    """A provider with the repository prepared."""

    provider: Provider
    spec: RepositorySpec
    task: Task


def make_provider(kind: str, state_dir: pathlib.Path, isolation: str = "shared", limits: Limits = LIMITS,
                  **options: Any) -> Provider:
    """A provider of one back end; local ones only with namespaces, because these tests attack them."""
    if kind == "docker":
        return DockerProvider(str(state_dir), limits, isolation, **options)
    provider = LocalProvider(str(state_dir), limits, isolation, **options)
    if provider.containment != "namespaces":
        pytest.skip(f"no namespaces on this machine: {provider.reason}")
    return provider


@pytest.fixture(scope="session", params=["local", pytest.param("docker", marks=pytest.mark.docker)])
def world(request, tmp_path_factory):
    """One prepared world per back end, shared by all tests of a session."""
    folder = tmp_path_factory.mktemp(f"world-{request.param}")
    spec = RepositorySpec("victim==1.2.3", str(write_repository(folder / "victim")))
    with make_provider(request.param, folder / "state") as provider:
        provider.prepare(spec)
        yield World(provider, spec, make_task())


@pytest.fixture
def agent(world):
    """A fresh agent's sandbox in the task's starting state."""
    with world.provider.create(world.spec.name, {SOURCE: BROKEN}) as place:
        yield place
