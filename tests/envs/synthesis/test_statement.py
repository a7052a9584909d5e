"""Statements: which call is told, in how many characters, and never the fix."""

import pytest

from qcn_jax.envs import patches
from qcn_jax.envs.synthesis import statement


def call(name, args=(), result=("None",), raised="", after=(), path="pkg/m.py", yields=False):
    """A recorded call as inside/observe.py returns it."""
    return {"path": path, "name": name, "args": list(args), "result": [] if raised else list(result),
            "raised": raised, "after": list(after), "yields": yields}  # fmt: skip


def test_innermost_call_is_told():
    """Inner calls end first; the outer one differs too, but only in consequence."""
    fixed = [call("inner", [("x", "1")], ["2"]), call("outer", [("x", "1")], ["[2]"])]
    buggy = [call("inner", [("x", "1")], ["3"]), call("outer", [("x", "1")], ["[3]"])]
    found = statement.find(buggy, fixed)
    assert (found.function, found.came, found.expected) == ("inner", ("returned", "3"), ("returned", "2"))
    text = statement.write(found, ["tests/test_m.py::test_inner"])
    assert text == "`inner(1)` in pkg/m.py returned 3; expected 2. Failing test: test_inner."


def test_only_one_function():
    fixed = [call("inner", result=["1"]), call("outer", result=["1"])]
    buggy = [call("inner", result=["2"]), call("outer", result=["2"])]
    assert statement.find(buggy, fixed, ("pkg/m.py", "outer")).function == "outer"
    assert statement.find(buggy, fixed, ("pkg/other.py", "outer")) is None


def test_only_equal_arguments_are_compared():
    """A call with other arguments is the consequence of an earlier difference, not the first one."""
    fixed = [call("low", [("x", "1")], ["1"]), call("high", [("x", "1")], ["1"])]
    buggy = [call("low", [("x", "2")], ["2"]), call("high", [("x", "1")], ["2"])]
    assert statement.find(buggy, fixed).function == "high"
    assert statement.find(fixed, fixed) is None


def test_repeated_calls_are_paired_in_order():
    fixed = [call("f", result=["1"]), call("f", result=["2"])]
    buggy = [call("f", result=["1"]), call("f", result=["3"])]
    assert statement.find(buggy, fixed).expected == ("returned", "2")


@pytest.mark.parametrize(
    ("buggy", "fixed", "expected"),
    [
        (call("f", raised="KeyError: 'a'"), call("f", result=["1"]), "raised KeyError: 'a'; expected it to return 1."),
        (call("f", result=["1"]), call("f", raised="ValueError"), "returned 1; expected it to raise ValueError."),
        (call("f", raised="A: b"), call("f", raised="C: d"), "raised A: b; expected C: d."),
        (
            call("f", [("x", "[1]")], after=[("x", "[1, 2]")]),
            call("f", [("x", "[1]")], after=[]),
            "left x as [1, 2]; expected [1].",
        ),
        (call("f", result=["1", "2"], yields=True), call("f", result=["1"], yields=True), "yielded 1, 2; expected 1."),
        (call("f", result=[], yields=True), call("f", result=["1"], yields=True), "yielded nothing; expected 1."),
    ],
)
def test_outcomes(buggy, fixed, expected):
    assert statement.write(statement.find([buggy], [fixed]), []).endswith(expected)


@pytest.mark.parametrize("limit", [120, 220, 500])
def test_limit_and_contrast(limit):
    """A long statement is cut where values agree; what differs stays in sight."""
    common = "word " * 200
    observation = statement.Observation(
        "package/module.py", "Class.method", (("self", "Class()"), ("text", repr(common))),
        ("returned", common + "LEFT"), ("returned", common + "RIGHT"),
    )  # fmt: skip
    text = statement.write(observation, ["tests/test_module.py::test_with_a_rather_long_name"] * 3, "E", limit)
    assert len(text) <= limit and "LEFT" in text and "RIGHT" in text and "self" not in text
    assert ("These tests fail" in text) == (limit > statement.SHORT)


@pytest.mark.parametrize(("said", "again", "told"), [
    ("E: 1 | a.py:2: f()", "E: 1 | a.py:2: f()", "E: 1 | a.py:2: f()"), ("E: 1 | a.py:2: f()", "E: 2 | a.py:2: f()", "E | a.py:2: f()"),
    ("E: 1 | a.py:2: f()", "F: 1 | a.py:2: f()", ""), ("E: 1 | a.py:2: f()", "E: 1 | a.py:3: g()", ""), ("E: 1", "E: 2", ""), ("E: 1", "", "")])
def test_what_two_runs_say_alike(said, again, told):
    assert statement.agreed(said, again) == told


def test_contains_fix():
    before, after = "def f(x):\n    return x + 1\n", "def f(x):\n    return x - 1\n"
    gold = patches.make_diff({"m.py": after}, {"m.py": before})
    assert statement.contains_fix("Write `return x+1` instead.", gold)
    assert statement.contains_fix("It says return x - 1.", gold)
    assert not statement.contains_fix("`f(1)` in m.py returned 0; expected 2.", gold)
