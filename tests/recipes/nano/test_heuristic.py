"""The heuristic baseline: what it suspects, in which order, and that it plays by an episode's rules."""

import concurrent.futures
import gc
import os
import subprocess
import sys
import time

import pytest

from qcn_jax.agents import python_code
from qcn_jax.agents.episode import EndReason, Episode
from qcn_jax.agents.tools import ToolExecutor
from qcn_jax.agents.trajectory import Trajectory
from qcn_jax.agents.workspace import OverlayWorkspace
from qcn_jax.chat import values
from qcn_jax.envs.patches import apply_diff, make_diff
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.pipeline.evaluate.baseline import BASELINES
from qcn_jax.recipes.nano import heuristic
from qcn_jax.recipes.nano.scaffold import NANO
from qcn_jax.recipes.nano.solver import SpanEdit
from tests.agents import tiny

FUNCTION = """def f(a, b):
    # not a real `not`
    if not a and b == 3:
        return "not this"
    return a + b"""


def _applied(edit):
    lines = FUNCTION.split("\n")
    lines[edit.line - 1] = lines[edit.line - 1].replace(edit.old, edit.new)
    return "\n".join(lines)


def test_suspects_not_first_then_comparisons_and_numbers_last():
    changed = [_applied(edit) for edit in heuristic.suspicions(FUNCTION.split("\n"))]
    expected = ["if a and b == 3", "if not a and b != 3", "if not a or b == 3", "return a - b", "b == 2:", "b == 4:"]
    assert len(changed) == len(expected)
    for text, part in zip(changed, expected, strict=True):
        assert part in text and text.count("not this") == 1 and "# not a real `not`" in text


def test_edits_that_do_not_parse_are_not_suggested():
    lines = ["def f(a):", "    return a is not None"]
    assert [lines[1].replace(edit.old, edit.new) for edit in heuristic.suspicions(lines)] == ["    return a is None"]
    assert heuristic.suspicions(["def f(:", "    return not a"]) == []


GOOD = "def f(a, b):\n    if a and b:\n        return 1 == b\n    return False\n"


def _episode(bad, tmp_path, max_turns=8):
    """An episode on a one-function repository whose single test really runs."""
    task = Task("t", "r", "", make_diff({"m.py": bad}, {"m.py": GOOD}), "", "`f` misbehaves", ("test_m.py::test_f",), (),
                bug_patch=make_diff({"m.py": GOOD}, {"m.py": bad}), path="m.py", function="f")
    check = "from m import f\nassert [f(1, 1), f(1, 2), f(0, 1), f(0, 0)] == [True, False, False, False]\n"

    def run_tests(changed, node_ids, timeout, fail_fast):
        (tmp_path / "m.py").write_text({"m.py": GOOD, **changed}["m.py"])
        done = subprocess.run([sys.executable, "-B", "-c", check], cwd=tmp_path, capture_output=True, check=False,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})
        outcome = "failed" if done.returncode else "passed"
        return TestRun("ok", {"test_m.py::test_f": outcome}, {}, 0.0, "", done.returncode)

    workspace = OverlayWorkspace({"m.py": GOOD}, {"m.py": bad}, run_tests)
    executor = ToolExecutor(task, NANO.tools, workspace)
    return Episode(task, NANO, executor, max_turns=max_turns)


def test_whoever_knows_the_fix_needs_one_attempt(tmp_path):
    episode = _episode(GOOD.replace("a and b", "a or b").replace("1 == b", "1 != b"), tmp_path)
    BASELINES.resolve("solver", "--baseline").play(episode)
    result = episode.result()
    assert result.reason is EndReason.SUBMITTED and result.tests_passed and len(result.runs) == 1
    wide = _episode(GOOD.replace("    return False\n", "    return True\n    pass\n"), tmp_path)  # no small span edit
    BASELINES.resolve("solver", "--baseline").play(wide)
    assert wide.result().reason is EndReason.SUBMITTED and not wide.result().tests_passed


@pytest.mark.parametrize("bad, attempts", [
    (GOOD.replace("if a", "if not a"), 1), (GOOD.replace("1 == b", "1 != b"), 1), (GOOD.replace("a and b", "a or b"), 2),
])
def test_repairs_simple_bugs_with_as_many_tests_as_it_needs(bad, attempts, tmp_path):
    episode = _episode(bad, tmp_path)
    heuristic.act(episode)
    result = episode.result()
    assert result.reason is EndReason.SUBMITTED and result.tests_passed
    assert result.attempts == attempts and not any(result.malformed)
    assert apply_diff({"m.py": bad}, result.patch) == {"m.py": GOOD}


def test_stops_at_the_turn_limit_like_everyone(tmp_path):
    episode = _episode(GOOD.replace("1 == b", "7 < b"), tmp_path, max_turns=3)
    heuristic.act(episode)
    assert episode.reason is EndReason.TURN_LIMIT and len(episode.turns) == 3
    assert not episode.result().tests_passed


def test_a_search_tries_guesses_first_and_is_verified():
    task = tiny.make_task()
    executor = lambda: NANO.executor(task, tiny.overlay(task, tiny.run_tests))
    guesses = [SpanEdit(99, "x", "y"), SpanEdit(3, "<=", ">="), SpanEdit(5, ">", "<"), SpanEdit(3, "<=", "==")]
    found = heuristic.search(task, NANO, executor(), guesses)
    assert found.search and found.patch == task.patch and found.outcomes == (False, True) and found.wrong_edits == 1
    edits = [call["arguments"]["line"] for m in found.messages if m["role"] == "assistant"
             for call in m["tool_calls"] if call["name"] == "edit"]
    assert edits == ["<|3|>", "<|5|>"]  # what does not apply is passed over
    assert Trajectory.from_json(found.to_json()) == found
    alone = heuristic.search(task, NANO, executor())
    assert alone is None or (alone.outcomes[-1] and not any(alone.outcomes[:-1]))
    assert heuristic.search(task, NANO, executor(), guesses[1:2], max_turns=2) is None  # not found in time


class _Garbage:
    """Lets other threads run in the middle of whatever allocation triggers its collection."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        time.sleep(0.0005)


FUNCTIONS = "\n".join(f"def f{i}(a):\n    return [(a + {i}) * (b - 1) for b in (a, {{a: [a]}})]" for i in range(50))
LITERAL = f"[{', '.join(['[[1, 2], [3, [4, [5]]]]'] * 200)}]"


@pytest.mark.parametrize("read, found", [
    (lambda number: len(python_code.function_spans(f"{FUNCTIONS}\nx = {number}")), 50),
    (lambda number: len(values.read_literal(LITERAL)), 200)], ids=["modules", "arguments of calls"])
def test_many_threads_may_parse_at_once(read, found):
    """Interpreters before 3.12 fail here when ast.parse is called from several threads without a lock."""
    def parse(number):
        gc.disable()
        for _ in range(5):
            _Garbage()
        gc.enable()
        return read(number)

    before = gc.get_threshold()
    gc.set_threshold(50)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            assert list(threads.map(parse, range(40))) == [found] * 40
    finally:
        gc.set_threshold(*before)
