"""Habits of real suites: subtests, parameters that tests change, functions that ask for the time."""

import ast
import random

import pytest

from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.synthesis import candidates, inject, sources, validate, verify
from qcn_jax.envs.synthesis.survey import take_survey
from qcn_jax.envs.tasks.log_parsers import runner_logs

SOURCE = '''import datetime
import time


def double(number):
    return number * 2


def ordered(items):
    items.sort()
    return items[0] + 1


def age(born):
    return datetime.date.today().year - born + 1


def later(seconds, bonus):
    return time.time() > 0 and seconds + bonus


def older(born):
    return age(born) > age(born + 1)
'''
TESTS = '''import unittest

import pytest

from habits.core import age, double, later, older, ordered


class Test(unittest.TestCase):
    def test_double(self):
        for number in range(4):
            with self.subTest(number=number):
                self.assertEqual(double(number), 2 * number)


@pytest.mark.parametrize("items", [[3, 1, 2], [5, 4]])
def test_ordered(items):
    before = list(items)
    first = ordered(items)
    assert items != before and first == min(before) + 1


def test_ages():
    assert older(2000) and age(2000) - age(1990) == -10 and age(1) > 2000


def test_later():
    assert later(1, 2) == 3
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("habits")
    root = folder / "habits-1.0"
    for path, text in {"habits/__init__.py": "", "habits/core.py": SOURCE, "tests/test_core.py": TESTS}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    spec = sources.locate(str(root))
    with make_provider("local", str(folder / "state")) as provider:
        yield provider, spec, take_survey(provider, spec)


def check(place, old, new, **options):
    provider, spec, survey = place
    start = SOURCE.index(old)
    line = SOURCE.count("\n", 0, start) + 1
    holder = [f for f in inject.functions(ast.parse(SOURCE)) if f.start_line <= line <= f.end_line][-1]
    injection = inject.Injection("any", "habits/core.py", holder.qualname, holder.start_line, holder.end_line, SOURCE, start,
                                 start + len(old), new)
    item = candidates.make_candidate(injection, spec, survey, random.Random(0))
    return validate.check(provider, item, validate.Options(**{"characters": 1500, "statement": "issue", **options}))


@pytest.mark.parametrize(("old", "new", "said"), [
    ("number * 2", "number * 3", "double"), ("items[0] + 1", "items[0] + 2", "ordered")])
def test_subtests_and_changed_parameters(place, old, new, said):
    verdict = check(place, old, new)
    assert verdict.outcome == "kept" and said in verdict.task.problem_statement
    assert verify.verify_task(place[0], verdict.task).problems == ()


def test_the_time_is_in_no_statement_and_no_held_out_test(place):
    """What a function that asks for the time gives is true at that time alone."""
    told = check(place, "later(seconds, bonus):\n    return time.time() > 0 and seconds + bonus",
                 "later(seconds, bonus):\n    return time.time() > 0 and seconds - bonus", held_out=True, tests_may_tell=True)
    assert "later(1, 2) == 3" in told.task.problem_statement and "returned" not in told.task.problem_statement
    assert "import habits" not in told.task.held_out_patch  # only copies of the repository's own tests
    assert check(place, "age(born) > age(born + 1)", "age(born) < age(born + 1)").outcome == "unobserved"


def test_failed_subtests_in_logs():
    """pytest 9 calls the test passed behind which a subtest of unittest failed."""
    log = """PASSED test_a.py::T::test_a
PASSED test_a.py::test_c
SUBFAILED(i=1, text='x) y') test_a.py::T::test_a - AssertionError: 1 == 1
SUBFAILED[msg] (i=1) test_a.py::test_b - assert 1 != 1
SUBFAIL test_a.py::T::test_d[1 2] - AssertionError
PASSED test_a.py::T::test_d[1 2]
"""
    assert runner_logs.pytest(log) == {
        "test_a.py::T::test_a": "failed", "test_a.py::test_c": "passed", "test_a.py::test_b": "failed",
        "test_a.py::T::test_d[1 2]": "failed"}
