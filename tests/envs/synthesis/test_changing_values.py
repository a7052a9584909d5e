"""What differs from one process to the next, or asks for the time, is in no statement."""

import ast
import random
import re

import pytest

from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.synthesis import candidates, inject, sources, validate
from qcn_jax.envs.synthesis.survey import take_survey
from tests.envs.synthesis.small import write_files

CHANGING = '''"""What no statement may tell."""

import datetime
import itertools
import random
import time

_numbers = itertools.count()


def stamp(flag):
    return time.time() if flag else 0


def drawn(flag):
    return random.random() if flag else 0


def numbered(flag):
    return next(_numbers) + 1 if flag else 0


def placed(flag):
    return id([flag]) if flag else 0


def dated(flag):
    return datetime.date.today() if flag else 0


def clocked(flag):
    return time.monotonic() if flag else 0


def measured(flag):
    return 1234567890123.000000000001 if flag else 0


def checked(flag):
    return bool(drawn(flag) and numbered(flag) and placed(flag))


def timed(flag):
    return bool(stamp(flag) and dated(flag))
'''


@pytest.mark.parametrize("name", ["stamp", "drawn", "numbered", "placed", "dated", "measured", "clocked"])
def test_what_differs_between_processes_is_not_told(changing, name):
    """Chance, a counter and an identity differ elsewhere, what asks for the time tells nothing; a long number is a value."""
    provider, spec, survey = changing
    holder = next(f for f in inject.functions(ast.parse(CHANGING)) if f.qualname == name)
    start = CHANGING.index("if flag", CHANGING.index(f"def {name}"))
    injection = inject.Injection("negate", "changing/core.py", name, holder.start_line, holder.end_line, CHANGING, start,
                                 start + len("if flag"), "if not flag")
    options = validate.Options(tests_may_tell=name == "clocked")  # nor may a test's message
    found = validate.check(provider, candidates.make_candidate(injection, spec, survey, random.Random(0)), options)
    task = found.task
    if name == "clocked":
        assert not re.search(r"\d\.\d", task.problem_statement)
    elif name in ("stamp", "dated"):
        assert task is None and found.outcome == "unobserved"
    elif name == "measured":
        assert "returned 0; expected 1234567890123.0" in task.problem_statement
    else:
        assert task.function == "checked" and "checked(True)" in task.problem_statement
        assert "returned False; expected True" in task.problem_statement


@pytest.fixture(scope="module", name="changing")
def _changing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changing")
    root = folder / "changing-1.0"
    write_files(root, {"changing/__init__.py": "", "changing/core.py": CHANGING, "tests/test_core.py": (
        "from changing.core import checked, clocked, measured, timed\n\n\ndef test_checked():\n    assert checked(True)\n\n\n"
        "def test_timed():\n    assert timed(True)\n\n\n"
        "def test_clocked():\n    assert clocked(False) == 0\n\n\n"
        "def test_measured():\n    assert measured(True)\n")})
    spec = sources.locate(str(root))
    with make_provider("local", str(folder / "state")) as provider:
        yield provider, spec, take_survey(provider, spec)
