"""Tools change files as they say, refuse what they must, and bound what they return."""

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcn_jax.agents import operations, tools
from qcn_jax.agents.tools import ToolExecutor
from qcn_jax.agents.workspace import WorkspaceError, read_tree, relative_path
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.recipes.nano.scaffold import NANO
from tests.agents import tiny


def no_tests(*_):
    raise AssertionError("no test run was asked for")


def make(scaffold=NANO, runner=no_tests, task=None, **options):
    task = task or tiny.make_task()
    return ToolExecutor(task, scaffold.tools, tiny.overlay(task, runner), **options)


def call(executor, name, **arguments):
    (result,) = executor.execute([ToolCall(name, arguments)])
    return result


def test_view_shows_the_tasks_function_with_line_tokens():
    result = call(make(), "view")
    assert result.ok
    assert [result.text[slice(*span)] for span in result.special] == [f"<|{number}|>" for number in range(1, 8)]
    assert result.text.split("\n")[:3] == [
        "calc/core.py", "<|1|>def clamp(self, value, low, high):", '<|2|>    """Puts value between low and high."""'
    ]
    assert result.text.endswith("<|7|>    return high if value > high else value")


def test_view_takes_a_symbol_and_a_path():
    executor = make()
    is_even = "calc/core.py\n<|1|>def is_even(n):\n<|2|>    return n % 2 == 0"
    assert call(executor, "view", symbol="is_even").text == is_even
    assert call(executor, "view", path="README.md").text == "README.md\n<|1|>A calculator.\n<|2|>"
    assert not call(executor, "view", symbol="absent").ok
    assert not call(executor, "view", path="absent.py").ok
    # After a failed view the former one still holds, and edits refer to it.
    assert call(executor, "edit", line="1", old="A", new="The").ok
    assert executor.workspace.read("README.md") == "The calculator.\n"


def test_view_is_bounded_to_the_lines_that_have_tokens():
    executor = make()
    executor.workspace.write("long.py", "\n".join(f"x{i} = {i}" for i in range(100)))
    shown = call(executor, "view", path="long.py").text.split("\n")
    assert len(shown) == 65 and shown[-1] == "<|64|>x63 = 63"


@pytest.mark.parametrize("line", ["5", "<|5|>", " 5 "])
def test_span_edit_and_undo(line):
    executor = make()
    assert call(executor, "edit", line=line, old=">", new="<").ok
    assert executor.workspace.read("calc/core.py") == tiny.GOOD
    assert executor.diff() == tiny.make_task().patch
    assert call(executor, "undo").ok
    assert executor.diff() == ""
    result = call(executor, "undo")
    assert result.ok and result.text == "nothing to undo" and executor.diff() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"line": "5", "old": "l", "new": "x"}, "edit: old occurs 2 times on line 5"),
        ({"line": "5", "old": "zzz", "new": "x"}, "edit: old occurs 0 times on line 5"),
        ({"line": "5", "old": "", "new": "x"}, "edit: old occurs 0 times on line 5"),
        ({"line": "0", "old": "if", "new": "x"}, "edit: line 0 is not one of 1 to 7"),
        ({"line": "8", "old": "if", "new": "x"}, "edit: line 8 is not one of 1 to 7"),
        ({"line": "-1", "old": "if", "new": "x"}, "edit: line '-1' is not a number"),
        ({"line": "²", "old": "if", "new": "x"}, "edit: line '²' is not a number"),
        ({"line": "9" * 5000, "old": "if", "new": "x"}, "edit: line 999999999 is not one of 1 to 7"),
        ({"line": "5", "old": "if", "new": "if"}, "edit: old and new are the same"),
        ({"line": "5", "old": "        if", "new": "x"}, "edit: old occurs 0 times on line 5"),
    ],
)
def test_span_edit_refusals_change_nothing(arguments, message):
    executor = make()
    result = call(executor, "edit", **arguments)
    assert (result.ok, result.malformed, result.text) == (False, False, message)
    assert executor.diff() == ""


def test_a_span_that_is_not_on_the_line_is_looked_for_on_the_nearest_one():
    executor = make()
    result = call(executor, "edit", line="6", old=">", new="<")  # lines 5 and 7 are equally near
    assert result.ok and result.text == "edited line 5"
    assert executor.diff() == tiny.make_task().patch


def test_line_numbers_follow_an_edit_that_adds_a_line():
    executor = make()
    assert call(executor, "edit", line="6", old="return low", new="low = low\n    return low").ok
    assert call(executor, "edit", line="8", old="value > high", new="value >= high").ok
    assert "            low = low\n    return low\n        return high if value >= high" in executor.workspace.read(
        "calc/core.py")
    call(executor, "undo")
    call(executor, "undo")
    assert call(executor, "edit", line="7", old="value > high", new="value >= high").ok


def test_edits_through_another_tool_take_the_function_off_view():
    executor = make(NANO)
    call(executor, "view", symbol="is_even")
    operations.insert(executor, "calc/core.py", 0, "# new first line")
    assert executor.view().start == 9  # the task's function again, where it is now


def test_calls_after_a_failed_one_are_skipped_and_nothing_runs():
    executor = make()
    results = executor.execute([
        ToolCall("edit", {"line": "5", "old": "zzz", "new": ""}), ToolCall("run_tests"), ToolCall("submit")
    ])
    assert [result.ok for result in results] == [False, False, False]
    assert not any(result.submitted or result.tests for result in results)


def test_nothing_runs_after_submit_and_not_more_than_the_limit():
    executor = make()
    results = executor.execute([ToolCall("submit"), ToolCall("run_tests")])
    assert [result.submitted for result in results] == [True]
    assert len(executor.execute([ToolCall("view")] * 100)) == tools.MAX_CALLS


def test_malformed_calls_name_what_is_wrong():
    executor = make()
    for bad, message in [
        (ToolCall("shell", {}), "no tool 'shell'; tools: view, search, edit, undo, run_tests, submit"),
        (ToolCall("edit", {"line": "5"}), "edit: parameter 'old' is missing"),
        (ToolCall("submit", {"now": "1"}), "submit: no parameter 'now'; parameters: none"),
        (ToolCall("edit", {"line": ["5"], "old": "", "new": ""}), "edit: parameter 'line' must be of type string"),
    ]:
        (result,) = executor.execute([bad])
        assert result.malformed and not result.ok and result.text == message


@given(st.text(max_size=300), st.integers(1, 100))
def test_clip_keeps_both_ends(text, limit):
    clipped = tools.clip(text, limit)
    assert len(clipped) <= limit + 60
    if len(text) <= limit:
        assert clipped == text
    else:
        half = limit // 2
        assert clipped.startswith(text[:half]) and clipped.endswith(text[len(text) - half :])


def test_output_is_bounded():
    executor = make(output_limit=200)
    executor.workspace.write("big.txt", "\n".join("needle" * 99 for _ in range(500)))
    text = call(executor, "search", pattern="needle").text
    assert len(text) < 300 and text.startswith("big.txt:1:needle") and text.endswith("... 495 more")


def test_search_finds_lines_and_respects_the_path():
    executor = make()
    assert call(executor, "search", pattern="def is_even").text == "calc/core.py:17:def is_even(n):"
    assert call(executor, "search", pattern="clamp", path="calc").text.count("\n") == 0
    assert call(executor, "search", pattern="def is_even", path="tests").text == "no match"
    assert not call(executor, "search", pattern="").ok


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "", "a/../../b", "x\0y", "/testbed/../etc"])
def test_paths_outside_the_repository_are_refused(path):
    with pytest.raises(WorkspaceError):
        relative_path(path)


def test_paths_are_cleaned():
    assert relative_path("/testbed/calc/core.py") == "calc/core.py"
    assert relative_path("./calc//core.py") == "calc/core.py"
    assert relative_path("/testbed") == relative_path(".") == "."


def test_run_tests_reports_failures_then_success():
    executor = make(runner=tiny.run_tests)
    result = call(executor, "run_tests")
    assert not result.tests.passed and (result.tests.failed, result.tests.total) == (3, 3)
    assert result.text == "FAILED 3 of 3\nassert 1 == 5"
    results = executor.execute([ToolCall("edit", {"line": "5", "old": ">", "new": "<"}), ToolCall("run_tests")])
    assert results[-1].tests.passed and results[-1].text == "ok"
    assert [result.changed for result in results] == [True, False]


def test_breaking_another_test_is_seen_although_the_failing_ones_pass():
    executor = make(runner=tiny.run_tests)
    executor.execute([ToolCall("edit", {"line": "5", "old": ">", "new": "<"})])
    executor.execute([ToolCall("edit", {"line": "3", "old": "not", "new": "False and not"})])
    summary = call(executor, "run_tests").tests
    assert not summary.passed and summary.names == ("tests/test_core.py::test_order",)


def run(status="ok", **outcomes):
    return TestRun(status=status, outcomes=outcomes, messages={}, seconds=0.0, output="", exit_status=0)


@pytest.mark.parametrize(
    ("given_run", "fail_fast", "passed", "failed"),
    [
        (run(a="passed", b="passed"), False, True, 0),
        (run(a="passed", b="skipped"), False, True, 0),
        (run(a="skipped", b="passed"), False, False, 1),
        (run(a="xfailed", b="passed"), False, True, 0),
        (run(a="passed"), False, False, 1),
        (run(a="failed"), False, False, 2),
        (run(a="failed"), True, False, 1),
        (run(a="passed"), True, False, 1),
        (run(), False, False, 2),
        (run("timeout", a="passed", b="passed"), False, False, 0),
        (run(a="error", b="passed"), False, False, 1),
        (dataclasses.replace(run(a="passed", b="passed"), tampered=("pytest.main",)), False, False, 0),
    ],
)
def test_outcomes_are_judged_as_grading_does(given_run, fail_fast, passed, failed):
    summary = tools.summarize(given_run, ("a", "b"), {"a"}, fail_fast)
    assert (summary.passed, summary.failed) == (passed, failed)


def test_a_sandbox_failure_is_not_the_agents():
    def broken(*_):
        raise SandboxError("the server ended")

    executor = make(runner=broken)
    with pytest.raises(SandboxError):
        executor.execute([ToolCall("run_tests")])


def test_failure_messages_hold_what_was_wrong_and_no_addresses():
    message = "E   AssertionError: assert <Box at 0x7f2fd4d57390> == 3\nE    +  where <Box at 0x7f2fd4d57390> = Box()\n"
    given_run = dataclasses.replace(run(a="failed"), messages={"a": message})
    assert tools.summarize(given_run, ("a",), {"a"}, False).message == "AssertionError: assert <Box at 0x0> == 3"


def test_a_syntax_error_reads_as_such():
    executor = make(runner=tiny.run_tests)
    results = executor.execute([ToolCall("edit", {"line": "5", "old": "if", "new": "if if"}), ToolCall("run_tests")])
    assert results[-1].tests.failed == 3 and "SyntaxError" in results[-1].text


def test_hidden_tests_are_not_named_to_the_agent():
    task = tiny.make_task(test_patch="diff")
    assert tools.visible_tests(task) == [(None, False)]
    assert [ids for ids, _ in tools.visible_tests(tiny.make_task())] == [
        tiny.make_task().FAIL_TO_PASS, tiny.make_task().PASS_TO_PASS]


def test_the_definition_that_the_patch_touches_is_shown():
    source = "if 1:\n    def f():\n        return 1\nelse:\n    def f():\n        return 2\n"
    patch = tiny.make_diff({"m.py": source}, {"m.py": source.replace("return 2", "return 3")})
    task = tiny.make_task(path="m.py", function="f", patch=patch)
    executor = make(task=task)
    executor.workspace.write("m.py", source)
    assert call(executor, "view").text.endswith("<|1|>def f():\n<|2|>    return 2")


def test_an_executor_can_be_sent_to_another_process():
    task = tiny.make_task()
    executor = ToolExecutor(task, NANO.tools, tiny.overlay(task))
    executor.execute([ToolCall("edit", {"line": "5", "old": ">", "new": "<"})])
    copy = pickle.loads(pickle.dumps(executor))
    assert copy.diff() == executor.diff() != ""
    assert call(copy, "undo").ok and copy.diff() == "" != executor.diff()


def test_read_tree_takes_text_files_only(tmp_path):
    tiny.write_tree(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("x")
    (tmp_path / "image.png").write_bytes(b"\x89\xff\x00")
    (tmp_path / "crlf.txt").write_bytes(b"a\r\nb")
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert read_tree(tmp_path) == tiny.PRISTINE | {"crlf.txt": "a\r\nb"}
