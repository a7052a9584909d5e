"""Statements as issues, and tests that are hidden: what agents are told and see."""

import dataclasses
import random
import re
import types

import pytest

from qcn_jax.agents import tools
from qcn_jax.agents.workspace import ProviderRunner, open_overlay
from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.synthesis import candidates, describe, inject, issue, quality, sources, statement, validate, verify
from qcn_jax.envs.synthesis.survey import take_survey
from qcn_jax.envs.tasks import formats, grading, hidden
from qcn_jax.envs.tasks.schema import Task
from tests.envs.synthesis.small import SOURCE, TESTS, write_repository
from tests.envs.synthesis.test_validate import PATH, candidate

OPTIONS = validate.Options(statement="issue", hide_tests=True, characters=1500, tests_may_tell=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(provider, spec, survey) of the small repository."""
    folder = tmp_path_factory.mktemp("issues")
    spec = sources.locate(str(write_repository(folder)))
    with make_provider("local", str(folder / "state")) as provider:
        yield provider, spec, take_survey(provider, spec)


@pytest.fixture(scope="module")
def task(place):
    return validate.check(place[0], candidate(place, "value > high", "value >= low"), OPTIONS).task


def told(text, source):
    """What an issue's program gives where numbers_pkg.core is `source`."""
    program = re.search(r"```python\n(.*?)```", text, re.S)[1].strip().split("\n")
    module = types.ModuleType("core")
    exec(source, vars(module))
    names = {}
    for line in program:
        match = re.fullmatch(r"from numbers_pkg\.core import (\w+)", line)
        if match:
            names[match[1]] = getattr(module, match[1])
    rest = [line for line in program if not line.startswith("from ")]
    exec("\n".join(rest[:-1]), names)
    try:
        value = eval(rest[-1], names)
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace('"', "").replace("'", "")
    return f"Stack(items={value.items})" if type(value).__name__ == "Stack" else repr(value)


@pytest.mark.parametrize(
    ("old", "new"),
    [("total += value", "total -= value"), ("value > high", "value >= low"), ("return self\n", "return item\n"),
     ("raise IndexError", "raise KeyError"), ("start > 0", "start > 1"), ("self.items.append(item)", "pass")])
def test_issues_are_true_and_name_no_test(place, old, new):
    """Both values of a statement come from its program, and no failing test is named."""
    task = validate.check(place[0], candidate(place, old, new), OPTIONS).task
    text, buggy = task.problem_statement, SOURCE.replace(old, new)
    said = re.findall(r"`([^`\n]+)`", text.split("```")[2])
    plain = [value.replace("'", "") for value in said]
    assert told(text, buggy).replace("'", "") == plain[0] and told(text, SOURCE).replace("'", "") == plain[1]
    assert not issue.names(text, issue.test_names(task.FAIL_TO_PASS)) and "tests/" not in text
    assert not describe.unreadable(text) and verify.verify_task(place[0], task).problems == ()


def test_verify_notices_false_statements(place, task):
    """A value that does not come, and a program that gives the same in both states."""
    for old, new, said in (("`10`", "`11`", "gives 10 without the fix, which it does not say"),
                           ("clamp(5, 0, 10)", "clamp(50, 0, 10)", "gives 10 with the fix, too")):
        false = dataclasses.replace(task, problem_statement=task.problem_statement.replace(old, new))
        (problem,) = verify.verify_task(place[0], false).problems
        assert problem.startswith("the statement is false: `clamp(") and problem.endswith(said)


def test_programs_of_packages_that_ask_the_time_as_they_are_loaded(place):
    """Loading a module is no part of what a program gives, however long it takes and whatever it asks."""
    provider, spec, _ = place
    slow = "import time\n\nSTART = time.time()\nwhile time.process_time() < 1:\n    pass\n\n\ndef f(x):\n    return x\n"
    program = "from slow import f\nf(3)"
    with provider.create(spec.name, {"slow.py": slow}) as sandbox:
        assert issue.repeat(sandbox, [program, program.replace("f(3)", "__import__('time').time()")], 60.0) == [
            [program, "gives", "3"], None]


def test_errors_of_misuse_are_not_what_is_expected():
    one = statement.Observation("a.py", "f", (), ("returned", "1"), ("raised", "x"))
    for good, count in (("AttributeError: 'NoneType' object has no attribute 'x'", 0), ("ValueError: x", 1)):
        assert len(issue.examples([one], [["f()", "gives", "1"]], [["f()", "raises", good]])) == count


def test_without_a_call_the_failing_line_is_told(place):
    task = validate.check(place[0], candidate(place, "list(items)", "items"), OPTIONS).task
    assert "stack.pop(0) == 1 and items == [1, 2]" in task.problem_statement and "test_stack" not in task.problem_statement


@pytest.mark.parametrize("verb", ["returned", "left self as"])
def test_what_differs_stays_in_sight(verb):
    """Values that are alike at first are shown where they are not."""
    common = "Polygon(" + "0.12345, " * 100
    said = issue.from_observation(statement.Observation("a.py", "C.f", (("self", common),), (verb, common + "LEFT)"), (verb, common + "RIGHT)")))
    assert "LEFT" in said and "RIGHT" in said and len(said) < statement.FULL


USING = """
import pkg

class TestAll:
    def test_it(self):
        other = pkg.g()
        made = pkg.f(1,
                     2)
        made.add(3)
        parts = {}
        parts["a"] = made
        other.go()
        assert parts["a"] == 7
        assert pkg.h() == 1
"""


@pytest.mark.parametrize(("source", "number", "shown"), [
    (USING, 13, "made = pkg.f(1,\n             2)\nmade.add(3)\nparts = {}\nparts[\"a\"] = made\nassert parts[\"a\"] == 7"),
    (USING, 14, "told"), ("def test(:", 1, "told"), ("x = 1\nassert x", 2, "told"),
    ("def test():\n    x = 1\n" + "    x += 1\n" * 20 + "    assert x\n", 23, "told"),
    # An assertion of several lines is shown whole, without what would be too much beside it; one of too many is cut off.
    ("def test():\n    x = 1\n" + "    x += 1\n" * 20 + "    assert x == (\n        1)\n", 23, "assert x == (\n    1)"),
    ("def test():\n    assert f() == [\n" + "        1,\n" * 20 + "    ]\n", 2,
     "assert f() == [\n" + "    1,\n" * 13 + "    ..."),
    # What is inside a text keeps its columns.
    ('def test():\n    x = """\n  A\nparagraph"""\n    assert f(x)\n', 5, 'x = """\n  A\nparagraph"""\nassert f(x)')])
def test_a_failing_line_comes_with_what_it_uses(source, number, shown):
    said = issue.from_message(f"E: 1 | tests/test_a.py:{number}: told", read={"tests/test_a.py": source}.get)
    assert f"```python\n{shown}\n```" in said and not issue.programs(said)


def test_an_error_alone_is_no_issue():
    assert issue.from_message("TypeError: sequence item 0 | pkg/core.py:7: return ''.join(parts)") == issue.from_message("TypeError: x") == ""


def test_hidden_tests(place, task):
    """Failing tests are not in the starting state; graders put them back, and the agent's tool runs what is left."""
    provider, pristine = place[0], place[0].files(place[1].name)
    start = {**pristine, **grading.starting_changes(task, pristine)}
    assert "def test_clamp" not in start["tests/test_core.py"] and "def test_mean" in start["tests/test_core.py"]
    assert patches.apply_changes(start, task.test_patch) == {"tests/test_core.py": TESTS}
    grader = grading.Grader(provider)
    assert grader.grade(task, task.patch).resolved
    assert grader.grade(task, "").outcome == "empty_patch"
    left = hidden.left(task)
    assert {name.split("::")[1] for name in left} == {"test_mean", "test_stack", "test_empty_stack", "test_countdown"}
    assert tools.visible_tests(task) == [(left, True)]
    executor = tools.ToolExecutor(task, (), open_overlay(task, pristine, ProviderRunner(provider, task.repo)))
    assert executor.test().passed
    executor.change(PATH, start[PATH].replace("total / len", "0 / len"))
    assert executor.test().failed == 1


def test_patches_that_bring_tests_back(place, task):
    """What an agent writes in the place of hidden tests decides nothing."""
    pristine = place[0].files(place[1].name)
    start = {**pristine, **grading.starting_changes(task, pristine)}
    easy = start["tests/test_core.py"] + "\n\ndef test_clamp():\n    pass\n"
    verdict = grading.Grader(place[0]).grade(task, patches.make_diff(
        {"tests/test_core.py": start["tests/test_core.py"], PATH: start[PATH]},
        {"tests/test_core.py": easy, PATH: start[PATH] + "\n"}))
    assert verdict.outcome == "unresolved" and set(verdict.dropped) == {"tests/test_core.py"}


def test_formats_of_hidden_tests(task):
    """SWE-smith takes failing tests out itself: its bug is that of the source alone."""
    assert patches.touched(formats.to_swesmith(task)["patch"]) == [PATH]
    assert patches.reverse(formats.to_swesmith(task)["patch"]) == task.patch
    assert formats.to_swebench(task)["test_patch"] == task.test_patch


FILE = '''import unittest


class Base(unittest.TestCase):
    def test_inherited(self):
        pass


class Case(Base):
    # What it is for.
    @unittest.skipIf(False, "never")
    def test_one(self):
        pass

    def test_two(self):
        pass


class Alone(unittest.TestCase):
    value = 1

    def test_three(self):
        pass


def test_four():
    pass
'''


def test_cutting_tests():
    """Functions with their decorators and comments; classes that have no test left; files where that cannot be."""
    files = {"tests/test_a.py": FILE, "pkg/core.py": "def f():\n    pass\n"}
    names = [f"tests/test_a.py::{name}" for name in ("Case::test_one", "Alone::test_three", "test_four[1]")]
    (text,) = hidden.without(names, files).values()
    assert "test_two" in text and "class Base" in text
    assert not any(word in text for word in ("test_one", "skipIf", "What it is for", "Alone", "test_four"))
    assert compile(text, "a", "exec") and "\n\n\n\n" not in text
    assert hidden.without(["tests/test_a.py::Case::test_inherited"], files) == {"tests/test_a.py": None}
    assert hidden.without(names, files, whole=True) == {"tests/test_a.py": None}
    assert hidden.without(["pkg/core.py::pkg.core.f"], files) is None


@pytest.mark.parametrize("needed", [False, True])
def test_whole_files_go_where_their_tests_cannot_be_cut(tmp_path, needed):
    """A failing test that its class inherits; where another file needs that file, nothing can be hidden, and no task is made."""
    source = "def up(x):\n    return x + 1\n"
    root = tmp_path / "repo"
    for path, text in {
            "pkg/__init__.py": "", "pkg/a.py": source,
            "tests/base.py": "from pkg import a\n\n\nclass Base:\n    def test_up(self):\n        assert a.up(1) == 2\n",
            "tests/test_up.py": "from tests.base import Base\n\n\nclass TestUp(Base):\n    pass\n",
            "tests/__init__.py": "", "tests/test_other.py": "from tests import test_up\n" * needed +
                                                            "def test_a():\n    pass\n\n\ndef test_b():\n    pass\n"}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    spec = sources.locate(str(root))
    with make_provider("local", str(tmp_path / "state")) as provider:
        survey = take_survey(provider, spec)
        (injection,) = inject.candidates(source, "pkg/a.py", ["change_arithmetic"])
        verdict = validate.check(provider, candidates.make_candidate(injection, spec, survey, random.Random(0)), OPTIONS)
        assert verdict.outcome == ("cannot_hide" if needed else "kept")
        task = verdict.task
        if needed:
            assert task is None
            return
        start = grading.starting_changes(task, provider.files(spec.name))
        assert task.FAIL_TO_PASS == ("tests/test_up.py::TestUp::test_up",) and start["tests/test_up.py"] is None
        assert hidden.left(task) == ("tests/test_other.py::test_a", "tests/test_other.py::test_b")
        assert grading.Grader(provider).grade(task, task.patch).resolved
        assert verify.verify_task(provider, task, reruns=1).problems == ()


@pytest.mark.parametrize(("text", "function", "score"), [
    ("It is slow.", "Stack.pop", 0.0), ("`Stack` is wrong.", "Stack.pop", 0.3), ("`pop` of numbers_pkg.core", "Stack.pop", 0.8),
    ("pop in numbers_pkg/core.py", "Stack.pop", 1.0), ("popular scores", "Stack.pop", 0.0), ("core", "", 0.2)])
def test_localisation(text, function, score):
    patch = patches.make_diff({PATH: "a\n"}, {PATH: "b\n"})
    task = Task("i", "r==1", "", patch, "", text, ("t.py::a",), ())
    assert quality.localisation(task, function) == score


def test_summary(task):
    other = dataclasses.replace(task, localisation=1.0, test_patch="", PASS_TO_PASS=())
    assert quality.summary([task, other]) == {
        "localisation": {"0.0 to 0.25": 0, "0.25 to 0.5": 0, "0.5 to 0.75": 0, "0.75 to 1.0": 2},
        "mean_localisation": 0.9, "tests_hidden": 1, "without_pass_to_pass": 1, "median_pass_to_pass": 7}


@pytest.mark.parametrize(("text", "kind"), [
    ("gives `<m.Thing object at 0x7f00aa11bb22>`", "address"), ("gives <Thing object>", "bare representation"),
    ("returned 0.0; expected 0.#", "digits left out"), ("gives 1767225600.5", "clock"), ("x" * 4001, "length"),
    ("gives 0x1F, 1234567890123 and <b>text</b>", "")])
def test_unreadable(text, kind):
    assert describe.unreadable(text) == kind
