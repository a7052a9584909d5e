"""Log parsers on logs that the runners wrote."""

import json

import pytest

from qcn_jax.envs.tasks import log_parsers
from qcn_jax.envs.tasks.log_parsers import runner_logs

NODE = """TAP version 13
# Subtest: numbers
    # Subtest: adds
    ok 1 - adds
      ---
      duration_ms: 0.3
      ...
    # Subtest: divides
    not ok 2 - divides
      ---
      duration_ms: 0.6
      failureType: 'testCodeFailure'
      error: |-
        Expected values to be strictly equal:
      code: 'ERR_ASSERTION'
      expected: 2
      actual: 3
      ...
    1..2
not ok 1 - numbers
  ---
  type: 'suite'
  ...
# Subtest: later
ok 2 - later # SKIP
# Subtest: someday
not ok 3 - someday # TODO
1..3
# tests 4
# pass 1
"""
# What node 20 writes where tests print, with blocks cut short.
NOISY = """TAP version 13
# inside outer
# \\# looks like a comment
# no newlineSubtest: trap
# ok 7 - printed
# not ok
# Subtest: trap
# Subtest: outer
    # Subtest: first
    ok 1 - first
      ---
      duration_ms: 0.780608
      ...
# printed between
    # Subtest: second
    not ok 2 - second
      ---
      duration_ms: 1.176605
      error: |-
        Expected values to be strictly equal:

        -3 !== -2

      code: 'ERR_ASSERTION'
      expected: -2
      actual: -3
      stack: |-
        ok 9 - in a stack
      ...
    # Subtest: third
    not ok 3 - third
      ---
      error: |-
        Expected values to be strictly deep-equal:
        + actual - expected

      expected:
        a: 1
      actual:
        a: 2
      ...
    1..3
not ok 1 - outer
  ---
  error: '2 subtests failed'
  ...
# Subtest: plain
not ok 2 - plain
  ---
  error: 'bad - thing # here'
  ...
# Subtest: words
not ok 3 - words
  ---
  error: `values "differ" - it's so`
  expected: true
  actual: false
  ...
1..3
# tests 5
"""
TAPE = """TAP version 13
# parses
ok 1 should be equal
ok 2 should be equal
# refuses
not ok 3 should throw
  ---
    operator: throws
    expected: 'SyntaxError'
    actual:   'undefined'
  ...

1..3
# tests 3
# pass  2
# fail  1
"""
JEST = """PASS src/a.test.js
  sum
    ✓ adds (2 ms)
    nested
      ○ skipped later
  ✓ top
FAIL src/b.test.js
  sum
    ✕ subtracts (5 ms)

  ● sum › subtracts

    expect(received).toBe(expected)

Tests:       1 failed, 1 skipped, 2 passed, 4 total
"""
MOCHA = """

  sum
    ✔ adds
    nested
      - later
    1) subtracts


  1 passing (5ms)
  1 pending
  1 failing

  1) sum
       subtracts:
"""
PYTEST = """tests/test_a.py::test_x PASSED            [ 50%]
=========================== short test summary info ============================
PASSED tests/test_a.py::test_y[a b - c]
SKIPPED [1] tests/test_a.py:3: why
XFAIL tests/test_a.py::test_z - reason
FAILED tests/test_a.py::test_w - AssertionError: assert 1 == 2
ERROR tests/test_b.py
"""
UNITTEST = """test_a (test_m.T.test_a) ... ok
test_b (test_m.T)
Says what it does ... FAIL
test_c (test_m.T.test_c) ... skipped 'why'
test_d (test_m.T.test_d) ... expected failure
"""
GO = "\n".join(json.dumps(event) for event in [
    {"Action": "run", "Package": "m/p", "Test": "TestA"},
    {"Action": "output", "Package": "m/p", "Test": "TestA", "Output": "    p_test.go:12: Add(1, 2) = 4, want 3\n"},
    {"Action": "fail", "Package": "m/p", "Test": "TestA"}, {"Action": "pass", "Package": "m/p", "Test": "TestB/sub"},
    {"Action": "output", "Package": "m/p", "Test": "TestD", "Output": "no newline--- PASS: TestD (0.00s)\n"},
    {"Action": "output", "Package": "m/p", "Test": "TestE", "Output": "--- PASS: TestF (0.00s)\n"},
    {"Action": "skip", "Package": "m/p", "Test": "TestC"}, {"Action": "fail", "Package": "m/p"}]) + "\nnot json\n"


@pytest.mark.parametrize(
    ("parser", "log", "outcomes"),
    [
        ("tap", NODE, {"numbers > adds": "passed", "numbers > divides": "failed", "later": "skipped", "someday": "xfailed"}),
        ("tap", NOISY, {"outer > first": "passed", "outer > second": "failed", "outer > third": "failed",
                        "plain": "failed", "words": "failed"}),
        ("tap", TAPE, {"parses > should be equal": "passed", "parses > should be equal #2": "passed",
                       "refuses > should throw": "failed"}),
        ("jest", JEST, {"src/a.test.js > sum > adds": "passed", "src/a.test.js > sum > nested > later": "skipped",
                        "src/a.test.js > top": "passed", "src/b.test.js > sum > subtracts": "failed"}),
        ("mocha", MOCHA, {"sum > adds": "passed", "sum > nested > later": "skipped", "sum > subtracts": "failed"}),
        ("pytest", PYTEST, {"tests/test_a.py::test_x": "passed", "tests/test_a.py::test_y[a b - c]": "passed",
                            "tests/test_a.py::test_z": "xfailed", "tests/test_a.py::test_w": "failed",
                            "tests/test_b.py": "failed"}),
        ("unittest", UNITTEST, {"test_m.T.test_a": "passed", "test_m.T.test_b": "failed", "test_m.T.test_c": "skipped",
                                "test_m.T.test_d": "xfailed"}),
        ("go_test", GO, {"m/p::TestA": "failed", "m/p::TestB/sub": "passed", "m/p::TestC": "skipped",
                         "m/p::TestD": "passed", "m/p": "failed"}),
    ],
)  # fmt: skip
def test_parser(parser, log, outcomes):
    assert log_parsers.PARSERS[parser](log) == outcomes
    assert log_parsers.PARSERS[parser]("") == {} and log_parsers.PARSERS[parser]("nonsense\nok\n{") in ({}, {"test": "passed"})


def test_messages():
    assert runner_logs.messages("go_test", GO) == {"m/p::TestA": "Add(1, 2) = 4, want 3"}
    assert runner_logs.messages("tap", TAPE) == {"refuses > should throw": "expected SyntaxError, got undefined"}
    assert runner_logs.messages("tap", NODE)["numbers > divides"] == "expected 2, got 3"
    assert runner_logs.messages("tap", NOISY) == {
        "outer > second": "expected -2, got -3",
        "outer > third": "Expected values to be strictly deep-equal: + actual - expected",
        "plain": "bad - thing # here", "words": 'values "differ" - it\'s so'}


def test_worse_outcome_counts():
    assert runner_logs.tap("ok 1 - same\nnot ok 2 - same\nok 3 - same\n") == {"same": "failed"}
