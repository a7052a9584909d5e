"""Scripted trajectories are what the tools really said, end with passing tests, and are the same for the same seed."""

import ast
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax.agents.episode import Episode
from qcn_jax.agents.trajectory import Trajectory
from qcn_jax.agents.workspace import Remembering
from qcn_jax.chat.templates import TEMPLATES
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.recipes.nano import solver
from qcn_jax.recipes.nano.scaffold import NANO
from qcn_jax.recipes.nano.solver import SpanEdit, solve, solve_with
from tests.agents import tiny


def make(task, scaffold=NANO, runner=tiny.run_tests):
    return scaffold.executor(task, tiny.overlay(task, runner))


def names(trajectory):
    return [[call["name"] for call in m["tool_calls"]] for m in trajectory.messages if m["role"] == "assistant"]


def said(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_a_straight_trajectory():
    task = tiny.make_task()
    trajectory = solve_with(tiny.provider(), task)
    assert names(trajectory) == [["view"], ["edit", "run_tests"], ["submit"]]
    assert trajectory.messages[3]["tool_calls"][0]["arguments"] == {"line": "<|5|>", "old": ">", "new": "<"}
    assert trajectory.messages[-2]["content"] == "ok"
    assert trajectory.patch == task.patch and trajectory.outcomes == (True,) and trajectory.wrong_edits == 0


def test_recovery_from_wrong_edits():
    task = tiny.make_task()
    trajectory = solve(task, make(task), seed=0, wrong=2)
    assert trajectory.outcomes == (False, False, True) and trajectory.wrong_edits == 2
    assert names(trajectory) == [
        ["view"], ["edit", "run_tests"], ["undo", "edit", "run_tests"], ["undo", "edit", "run_tests"], ["submit"]]
    failures = [said(m) for m in trajectory.messages if m["role"] == "tool" and said(m).startswith("FAILED")]
    assert len(failures) == 2
    assert trajectory.patch == task.patch


def test_another_edit_that_passes_the_tests_is_submitted():
    task = tiny.make_task()
    trajectory = solve(task, make(task), seed=3, wrong=2)
    assert trajectory.outcomes == (False, True) and names(trajectory)[-1] == ["submit"]
    assert trajectory.patch not in ("", task.patch)


def test_trajectories_are_reproducible_and_seeds_differ():
    task = tiny.make_task()
    rows = [solve(task, make(task), seed=seed, wrong=1).to_json() for seed in (0, 0, 1, 2, 3)]
    assert rows[0] == rows[1]
    assert len({json.dumps(row) for row in rows}) > 2


def test_trajectories_survive_json():
    task = tiny.make_task()
    for scaffold in (NANO, NANO.single()):
        trajectory = solve(task, make(task, scaffold), scaffold)
        assert Trajectory.from_json(json.loads(json.dumps(trajectory.to_json()))) == trajectory


def test_replaying_a_trajectory_gives_every_observation_again():
    task = tiny.make_task()
    trajectory = solve(task, make(task), seed=5, wrong=2)
    episode = Episode(task, NANO, make(task))
    for message in trajectory.messages:
        if message["role"] == "assistant":
            calls = [solver.ToolCall(call["name"], call["arguments"]) for call in message["tool_calls"]]
            episode.step(NANO.render("", calls))
    replayed = [m for m in episode.messages if m["role"] != "assistant"]
    assert replayed == [m for m in trajectory.messages if m["role"] != "assistant"]
    assert episode.result().patch == trajectory.patch


def test_single_turn_and_format_trajectories():
    task = tiny.make_task()
    runs = []

    def counted(*arguments):
        runs.append(arguments)
        return tiny.run_tests(*arguments)

    runner = Remembering(counted)
    for scaffold in (NANO.single(), *map(NANO.in_template, TEMPLATES)):
        trajectory = solve_with(tiny.provider(), task, scaffold, wrong=1, runner=runner)
        assert names(trajectory) == [["edit"]] and trajectory.template == scaffold.template
        assert trajectory.patch == task.patch and trajectory.wrong_edits == 0
        assert any(part.get("special") for part in trajectory.messages[0]["content"])
    assert len(runs) == 2  # the failing tests and the others, once for all


def test_several_edits_for_a_fix_of_several_lines():
    good = 'if value < low:\n            return low\n        return high if value > high'
    bad = 'if value > low:\n            return high\n        return high if value < high'
    task = tiny.make_task(good, bad)
    trajectory = solve(task, make(task), wrong=1)
    assert names(trajectory)[-2][-4:] == ["edit", "edit", "edit", "run_tests"]
    assert trajectory.patch == task.patch


@pytest.mark.parametrize(("good", "bad", "fields"), [
    ("return low\n", "return low\n            print()\n", {}),  # another number of lines
    ("return n % 2 == 0", "return n % 2 == 1", {}),  # outside the function on view
    ("if value < low:", "if value > low:", {"function": "absent"}),
    ("if value < low:", "if value > low:", {"path": "absent.py"}),
    ("        if value < low:", "        # if value < low:\n        if value < low:", {}),
])
def test_fixes_that_are_no_span_edit_are_passed_over(good, bad, fields):
    task = tiny.make_task(good, bad, **fields)
    assert solve(task, make(task, runner=None)) is None


def test_a_trajectory_whose_tests_fail_is_not_kept():
    # The patch is applied faithfully, but the defect that the tests see is another one.
    task = tiny.make_task()
    both = tiny.GOOD.replace("if value < low:", "if value > low:").replace("% 2 == 0", "% 2 == 1")
    task = tiny.make_task(bug_patch=tiny.make_diff({"calc/core.py": tiny.GOOD}, {"calc/core.py": both}))
    assert solve(task, make(task)) is None
    assert solve(task, make(task, NANO.single()), NANO.single()) is None


def test_the_graders_word_is_final():
    task = tiny.make_task()
    seen = []

    def grade(task_, patch):
        seen.append((task_.instance_id, patch))
        return False

    assert solve(task, make(task), grade=grade) is None
    assert seen == [(task.instance_id, task.patch)]


def test_a_sandbox_failure_is_not_a_rejection():
    def broken(*_):
        raise SandboxError("gone")

    task = tiny.make_task()
    for scaffold in (NANO, NANO.single()):
        with pytest.raises(SandboxError):
            solve(task, make(task, scaffold, broken), scaffold)


def test_wrong_edits_are_real_parse_and_are_not_the_right_one():
    task = tiny.make_task()
    executor = make(task, runner=None)
    assert solver.find_views(task, executor) == [solver.ToolCall("view")]
    gold = solver.gold_edits(task, executor)
    assert gold == [SpanEdit(5, ">", "<")]
    lines = solver.spans.dedent(executor.workspace.read("calc/core.py").split("\n")[7:14])
    chosen = solver.wrong_edits(task, executor, gold, seed=0, count=1000)
    assert len(chosen) > 8 and len(set(chosen)) == len(chosen) and not set(chosen) & set(gold)
    for edit in chosen:
        line = lines[edit.line - 1]
        assert line.count(edit.old) == 1 and '"""' not in line
        changed = [*lines]
        changed[edit.line - 1] = line.replace(edit.old, edit.new)
        assert changed != lines
        ast.parse("\n".join(changed))
    near = [solver.wrong_edits(task, executor, gold, seed, 1)[0].line == 5 for seed in range(40)]
    assert 12 < sum(near) < 36


def test_a_defect_in_another_function_is_looked_up_if_its_name_is_in_sight():
    good = tiny.GOOD.replace("return high if value > high else value", "return high if is_even(value) else value")
    bad = good.replace("% 2 == 0", "% 2 == 1")
    for seen, defect in ((good, bad), (tiny.GOOD, tiny.GOOD.replace("% 2 == 0", "% 2 == 1"))):
        files = {"calc/core.py": defect}, {"calc/core.py": seen}
        patch, bug = tiny.make_diff(*files), tiny.make_diff(*files[::-1])
        task = tiny.make_task(patch=patch, bug_patch=bug, FAIL_TO_PASS=("a",), PASS_TO_PASS=())
        pristine = tiny.PRISTINE | {"calc/core.py": seen}

        def runner(changed, node_ids, timeout, fail_fast, seen=seen):
            repaired = changed.get("calc/core.py", seen) == seen
            return tiny.TestRun("ok", {"a": "passed" if repaired else "failed"}, {}, 0.0, "", 0)

        executor = NANO.executor(task, tiny.open_overlay(task, pristine, runner))
        trajectory = solve(task, executor, wrong=1)
        if seen == tiny.GOOD:
            assert trajectory is None
            continue
        assert names(trajectory)[:2] == [["view"], ["view"]] and trajectory.patch == patch
        assert trajectory.messages[3]["tool_calls"][0]["arguments"] == {"symbol": "is_even"}
        assert "<|1|>def is_even(n):\n<|2|>    return n % 2 == 1" in said(trajectory.messages[4])
        assert solve(task, NANO.single().executor(task, tiny.open_overlay(task, pristine, runner)), NANO.single()) is None


def test_while_loops_are_left_alone():
    lines = ["def f(n):", "    while n > 1:", "        n -= 1", "        if n == 2:", "            break",
             "    return n + 1"]
    assert {number for number, _ in solver._mutations(lines)} == {6}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_span_edits_turn_one_function_into_the_other(seed):
    task = tiny.make_task()
    executor = make(task, runner=None)
    before = executor.workspace.read("calc/core.py").split("\n")[7:14]
    after = list(before)
    for edit in solver.wrong_edits(task, executor, [], seed, 3):
        after[edit.line - 1] = before[edit.line - 1].replace(edit.old, edit.new)
    edits = solver.span_edits(before, after)
    again = list(before)
    for edit in edits:
        assert again[edit.line - 1].count(edit.old) == 1
        again[edit.line - 1] = again[edit.line - 1].replace(edit.old, edit.new)
    assert again == after
