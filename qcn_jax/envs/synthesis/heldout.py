"""Held-out tests: calls that no test of the repository makes, and what the fixed code gives for them.

Functions of a module that were seen misbehaving are called with arguments that vary those of the failing test. Calls
that end differently in the two states become tests that a right fix must pass; some that end alike guard the rest.
Where no such call can be made (objects for arguments, say) a test file's own tests stand under another name, which
patches that know the tests by name or place do not expect. They are a second opinion on a patch: no agent sees them,
and no statement tells of them (`second_opinion`).
"""

import dataclasses
import importlib.resources
import posixpath
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qcn_jax import syntax
from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.base import PASSING, Sandbox
from qcn_jax.envs.synthesis import statement
from qcn_jax.envs.tasks.schema import Task

PATH = "test_held_out.py"
FUNCTIONS = 4  # called for one task
VARIANTS = 24  # of the arguments of one call
TESTS = 6  # kept of each group
_INSIDE = importlib.resources.files("qcn_jax.envs.synthesis.inside")
_SCRIPT = "\n".join((_INSIDE / name).read_text() for name in ("clocks.py", "differential.py"))


def calls(observations: Iterable[statement.Observation], seed: str) -> list[dict[str, Any]]:
    """Calls to make: {path, function, arguments: {name: text}}, all of functions of a module with literal arguments."""
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    functions: set[tuple[str, str]] = set()
    for observation in observations:
        place = (observation.path, observation.function)
        values = _literals(observation.arguments)
        if "." in observation.function or not values or place in functions or len(functions) == FUNCTIONS:
            continue
        functions.add(place)
        seen = {repr(values)}
        for _ in range(VARIANTS):
            varied = dict(values)
            for name in rng.sample(sorted(varied), rng.randint(1, min(2, len(varied)))):
                varied[name] = vary(varied[name], rng)
            if repr(varied) not in seen and len(repr(varied)) < 400:
                seen.add(repr(varied))
                made.append({"path": observation.path, "function": observation.function,
                             "arguments": {name: repr(value) for name, value in varied.items()}})
    return made


def _literals(arguments: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """Argument values by name, or None where one is no literal (an object, a cut text)."""
    try:
        return {name: syntax.literal(text) for name, text in arguments}
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def vary(value: Any, rng: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + rng.choice([-2, -1, 1, 2]) if rng.random() < 0.8 else -value
    if isinstance(value, str | bytes):
        return rng.choice([value[::-1], value.upper(), value + value[:1], value[1:], value[:-1], value * 2])
    if isinstance(value, list | tuple) and value:
        kind, items = type(value), list(value)
        at = rng.randrange(len(items))
        changed = [*items[:at], vary(items[at], rng), *items[at + 1:]]
        return kind(rng.choice([items[::-1], items[:-1], items + items[:1], changed]))
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value, key=repr))
        return {**value, key: vary(value[key], rng)}
    return value


def call_all(sandbox: Sandbox, wanted: Sequence[Mapping[str, Any]], timeout: float) -> list[Any]:
    """What each call gave in the sandbox's present state: [module, expression, outcome, text], or None."""
    if not wanted:
        return []
    run = sandbox.run_python(_SCRIPT, list(wanted), timeout)
    return run.value if run.status == "ok" else []


def add(
    task: Task, good: Sequence[Any], bad: Sequence[Any], sandbox: Sandbox, fixed: Mapping[str, str], timeout: float
) -> Task:
    """The task with tests of what calls gave in the fixed (`good`) and in the defective state (`bad`).

    Those are kept that the sandbox (in the defective state) and the files `fixed` bear out; without one that tells
    the states apart the task is returned unchanged.
    """
    pairs = [(a, b) for a, b in zip(good, bad) if a is not None and b is not None]
    differing = [a for a, b in pairs if a[2:] != b[2:]]
    if not differing:
        return task
    chosen = differing[:TESTS] + [a for a, b in pairs if a[2:] == b[2:]][:TESTS]
    lines = ["import pytest\n\n", *(f"import {module}\n" for module in sorted({call[0] for call in chosen}))]
    lines += [f"\n\ndef test_{number}():\n{_body(*call[1:])}" for number, call in enumerate(chosen)]
    names = [f"{PATH}::test_{number}" for number in range(len(chosen))]
    return _borne_out(task, PATH, "".join(lines), names, sandbox, fixed, timeout)


def _body(expression: str, outcome: str, text: str) -> str:
    if outcome == "raised":
        return f"    with pytest.raises({text}):\n        {expression}\n"
    return f"    assert {expression} == {text}\n"


def mirrored(task: Task, sandbox: Sandbox, fixed: Mapping[str, str], timeout: float) -> Task:
    """The task with copies of some of its tests, as the sandbox (in the defective state) and `fixed` bear them out."""
    path = task.FAIL_TO_PASS[0].split("::")[0]
    copy = posixpath.join(posixpath.dirname(path), PATH)
    text = sandbox.read(path)
    names = [copy + name.removeprefix(path) for group in (task.FAIL_TO_PASS, task.PASS_TO_PASS)
             for name in [name for name in group if name.startswith(f"{path}::")][:TESTS]]
    return _borne_out(task, copy, text, names, sandbox, fixed, timeout)


def _borne_out(
    task: Task, path: str, text: str, names: Sequence[str], sandbox: Sandbox, fixed: Mapping[str, str], timeout: float
) -> Task:
    """The task with the tests `names` of the file `path`, as far as they do what they should in both states."""
    sandbox.write(path, text)
    before = sandbox.run_tests(names, timeout).outcomes
    for place, content in fixed.items():
        sandbox.write(place, content)
    after = sandbox.run_tests(names, timeout).outcomes
    passing = [name for name in names if after.get(name) in PASSING]
    failing = tuple(name for name in passing if before.get(name) in ("failed", "error"))
    if not failing:
        return task
    return dataclasses.replace(
        task, held_out_patch=patches.make_diff({}, {path: text}), HELD_OUT_FAIL_TO_PASS=failing,
        HELD_OUT_PASS_TO_PASS=tuple(name for name in passing if before.get(name) in PASSING))


def second_opinion(task: Task) -> Task | None:
    """The task whose tests are the held-out ones, for grading as usual; None where there are none."""
    if not task.HELD_OUT_FAIL_TO_PASS:
        return None
    return dataclasses.replace(
        task, instance_id=f"{task.instance_id}.held_out", test_patch=task.test_patch + task.held_out_patch,
        FAIL_TO_PASS=task.HELD_OUT_FAIL_TO_PASS, PASS_TO_PASS=task.HELD_OUT_PASS_TO_PASS)
