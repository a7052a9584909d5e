"""Validation by execution, on a small repository in a local sandbox."""

import ast
import concurrent.futures
import dataclasses
import json
import random

import pytest

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.synthesis import (
    candidates,
    combine,
    heldout,
    inject,
    quality,
    sources,
    statement,
    synthesize,
    validate,
    verify,
)  # fmt: skip
from qcn_jax.envs.synthesis.survey import Survey, take_survey
from qcn_jax.envs.tasks import grading
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError
from tests.envs.synthesis.small import SOURCE, write_files, write_repository

PATH = "numbers_pkg/core.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(provider, spec, survey) of the small repository."""
    folder = tmp_path_factory.mktemp("small")
    spec = sources.locate(str(write_repository(folder)))
    with make_provider("local", str(folder / "state")) as provider:
        yield provider, spec, take_survey(provider, spec)


def candidate(place, old, new, kind="change_boundary"):
    """The candidate that replaces `old` by `new` in SOURCE."""
    _, spec, survey = place
    start = SOURCE.index(old)
    line = SOURCE.count("\n", 0, start) + 1
    holder = [f for f in inject.functions(ast.parse(SOURCE)) if f.start_line <= line <= f.end_line][-1]
    injection = inject.Injection(kind, PATH, holder.qualname, holder.start_line, holder.end_line, SOURCE, start,
                                 start + len(old), new)  # fmt: skip
    return candidates.make_candidate(injection, spec, survey, random.Random(0))


def test_survey(place):
    """Which tests call what; failing tests and those without lasting ids are left out and counted."""
    _, spec, survey = place
    assert spec.name == "numbers_pkg==1.0"
    assert len(survey.tests) == 9 and survey.failing == 1 and survey.unstable == 3
    called = {name: [survey.tests[i].split("::")[1] for i in found] for name, found in survey.callers.items()}
    assert called[f"{PATH}::clamp"] == [f"test_clamp[{case}]" for case in ("5-5", "-1-0", "11-10", "0-0", "10-10")]
    assert called[f"{PATH}::Stack.pop"] == ["test_stack", "test_empty_stack"]
    assert called[f"{PATH}::countdown"] == ["test_countdown"] and f"{PATH}::unused" not in called
    assert survey == Survey.from_json(json.loads(json.dumps(dataclasses.asdict(survey))))


def test_kept_candidate(place):
    """F2P fail, P2P pass, the reverse patch is the gold one, and the statement says what was seen."""
    provider = place[0]
    verdict = validate.check(provider, candidate(place, "total += value", "total -= value", "change_augmented"))
    task = verdict.task
    assert verdict.outcome == "kept" and verdict == validate.Verdict.from_json(verdict.to_json())
    assert [name.split("::")[1] for name in task.FAIL_TO_PASS] == ["test_mean"]
    assert len(task.PASS_TO_PASS) == 8
    assert task.problem_statement == (
        "`mean([1, 2, 3])` in numbers_pkg/core.py returned -2.0; expected 2.0. Failing test: test_mean.")  # fmt: skip
    assert (task.function, task.path, task.kind) == ("mean", PATH, "change_augmented")
    start = patches.apply_diff({PATH: SOURCE}, task.bug_patch)
    assert "total -= value" in start[PATH] and patches.apply_diff(start, task.patch)[PATH] == SOURCE
    assert grading.Grader(provider).grade(task, task.patch).resolved
    assert verify.verify_task(provider, task).problems == ()


def test_pass_to_pass(place):
    """All tests of the suite that pass before and after, those that the change can break first; or a sample."""
    item = candidate(place, "value > high", "value >= low")
    task = validate.check(place[0], item).task
    names = [name.split("::")[1] for name in task.PASS_TO_PASS]
    assert {name.split("::")[1] for name in task.FAIL_TO_PASS} == {"test_clamp[5-5]", "test_clamp[0-0]"}
    assert set(names[:3]) == {"test_clamp[-1-0]", "test_clamp[11-10]", "test_clamp[10-10]"}
    assert set(names[3:]) == {"test_mean", "test_stack", "test_empty_stack", "test_countdown"}
    assert not {*names} & {"test_already_failing"} and not any("wandering" in name for name in names)
    sampled = validate.check(place[0], item, validate.Options(pass_to_pass=2)).task
    assert sampled.PASS_TO_PASS[:3] == task.PASS_TO_PASS[:3] and len(sampled.PASS_TO_PASS) == 5


@pytest.mark.parametrize("fail_fast", [True, False])
def test_what_breaks_other_functions_does_not_resolve(place, monkeypatch, fail_fast):
    """A patch that mends the defect and makes other public functions return None, which no test of the defect calls."""
    task = validate.check(place[0], candidate(place, "value > high", "value >= low")).task
    start = patches.apply_diff({PATH: SOURCE}, task.bug_patch)
    broken = SOURCE.replace("def mean(values):\n", "def mean(values):\n    return None\n")
    monkeypatch.setattr(grading, "FIRST_PART", 2)  # what a verdict begins with holds none of their tests
    grader = grading.Grader(place[0], fail_fast)
    verdict = grader.grade(task, patches.make_diff(start, {PATH: broken}))
    assert verdict.outcome == "unresolved"
    assert [name.split("::")[1] for name in verdict.tests_status["PASS_TO_PASS"]["failure"]] == ["test_mean"]
    assert grader.grade(task, task.patch).resolved


def test_failing_tests_beyond_those_tried_first(place):
    """Of a function's many tests a sample is run first; the others that fail are found with the whole suite."""
    item = candidate(place, "value > high", "value >= low")
    few = tuple(name for name in item.everything if name.endswith(("test_clamp[5-5]", "test_clamp[-1-0]")))
    task = validate.check(place[0], dataclasses.replace(item, tests=few, observe=few)).task
    assert {name.split("::")[1] for name in task.FAIL_TO_PASS} == {"test_clamp[5-5]", "test_clamp[0-0]"}
    assert len(task.PASS_TO_PASS) == 7


def test_samples_are_spread_over_files():
    names = [f"tests/test_{file}.py::test_{number}" for file, count in (("a", 60), ("b", 30), ("c", 1))
             for number in range(count)]
    count = lambda found, file: sum(name.startswith(f"tests/test_{file}.py") for name in found)
    chosen = candidates.spread(names, 12, random.Random(0))
    assert [count(chosen, file) for file in "abc"] == [8, 3, 1] or [count(chosen, file) for file in "abc"] == [7, 4, 1]
    assert chosen == [name for name in names if name in set(chosen)]
    assert {name.split("::")[0] for name in candidates.spread(names, 3, random.Random(1))} == {
        name.split("::")[0] for name in names}
    assert candidates.spread(names, 1000, random.Random(0)) == names


@pytest.mark.parametrize(
    ("old", "new", "function", "text"),
    [
        ("return self\n", "return item\n", "Stack.push", "returned 3; expected Stack(items=[1, 2, 3])"),
        ("raise IndexError", "raise KeyError", "Stack.pop", "raised KeyError: 'empty stack'; expected IndexError: empty stack"),
        ("start > 0", "start > 1", "countdown", "yielded 3, 2; expected 3, 2, 1"),
    ],
)  # fmt: skip
def test_observations(place, old, new, function, text):
    """The innermost function seen misbehaving, whichever one the defect stands in."""
    task = validate.check(place[0], candidate(place, old, new)).task
    assert task.function == function and text in task.problem_statement


@pytest.mark.parametrize(
    ("old", "new", "outcome"),
    [
        ("value < low", "value <= low", "survived"),  # an equivalent change
        ("list(items)", "items", "unobserved"),  # the caller's list is shared: no call returns anything else
        ("start -= 1", "start -= 0", "timeout"),
        ("start -= 1", "import time; time.sleep(60)", "timeout"),
        ("def countdown(start):", "def renamed(start):", "broken"),  # the test file cannot be imported
        ("total = 0", "import os; os._exit(1)", "crashed"),
    ],
)
def test_rejected(place, old, new, outcome):
    item = candidate(place, old, new)
    verdict = validate.check(place[0], item, validate.Options(timeout=3.0))
    assert (verdict.outcome, verdict.task) == (outcome, None)


def test_told_by_its_tests(place):
    """A defect that no call shows has a statement all the same where that is asked for."""
    options = validate.Options(tests_may_tell=True, characters=statement.FULL)
    task = validate.check(place[0], candidate(place, "list(items)", "items"), options).task
    assert task.function == "" and task.problem_statement.startswith("The test tests/test_core.py::test_stack fails: ")
    assert "list(items)" not in task.problem_statement and verify.verify_task(place[0], task).problems == ()


def test_flaky_candidate(place):
    """A defect that shows itself in half of all runs is no task: fifteen runs that agree are not to be expected."""
    text = "(total if __import__('time').time_ns() // 1000 % 2 else 0)"
    item = candidate(place, "total / len", f"{text} / len")
    outcomes = []
    while "flaky" not in outcomes and len(outcomes) < 20:
        outcomes.append(validate.check(place[0], item, validate.Options(reruns=12)).outcome)
    assert outcomes[-1] == "flaky" and set(outcomes) <= {"flaky", "survived"}


def test_failing_test_that_leaves_something_behind(tmp_path):
    """Graders name failing tests first, but files run in their own order: what came before the failure still passes."""
    source = "left = []\n\n\ndef up(x):\n    return x + 1\n"
    head = "import pytest\nfrom pkg import a\n\n\n"
    write_files(tmp_path / "repo", {
        "pkg/__init__.py": "", "pkg/a.py": source,
        "tests/test_first.py": head + "def test_zero():\n    a.up(0)\n    assert not a.left\n",
        "tests/test_second.py": head + "def test_up():\n    a.left.append(1)\n    assert a.up(1) == 2\n    a.left.clear()\n\n\n"
                                "@pytest.mark.parametrize('n', range(4))\ndef test_nothing(n):\n    pass\n",
    })  # fmt: skip
    spec = sources.locate(str(tmp_path / "repo"))
    with make_provider("local", str(tmp_path / "state")) as provider:
        survey = take_survey(provider, spec)
        (injection,) = inject.candidates(source, "pkg/a.py", ["change_arithmetic"])
        task = validate.check(provider, candidates.make_candidate(injection, spec, survey, random.Random(0))).task
        assert task.FAIL_TO_PASS == ("tests/test_second.py::test_up",)
        assert task.PASS_TO_PASS == ("tests/test_first.py::test_zero", *(
            f"tests/test_second.py::test_nothing[{number}]" for number in range(4)))
        assert verify.verify_task(provider, task).problems == ()


def test_verify_notices_wrong_tasks(place):
    """A gold patch that does not resolve, and a task that is resolved from the start."""
    provider = place[0]
    task = validate.check(provider, candidate(place, "value > high", "value >= low")).task
    useless = dataclasses.replace(task, patch=patches.make_diff({PATH: "a\n"}, {PATH: "b\n"}))
    assert "gold patch gives patch_failed" in verify.verify_task(provider, useless).problems[0]
    solved = dataclasses.replace(task, FAIL_TO_PASS=task.PASS_TO_PASS, PASS_TO_PASS=())
    assert any("passes" in problem for problem in verify.verify_task(provider, solved).problems)
    silent = dataclasses.replace(task, problem_statement=" \n")
    assert verify.verify_task(provider, silent).problems == ("problem_statement is empty",)


def test_ids_that_do_not_last(place, tmp_path):
    """Sets of what an id tells are no reason to leave a test out; sets of what it numbers are, listed or not."""
    root = write_repository(tmp_path, "wandering-1.0")
    pairs = "{" + ", ".join(f'("{letter}", {number})' for number, letter in enumerate("abcdef")) + "}"
    (root / "tests/test_core.py").write_text(f"""import pytest
from numbers_pkg.core import mean


@pytest.mark.parametrize("word", {{"one", "two"}})
@pytest.mark.parametrize("kind, number", {{(str, 1), (int, 2)}})
def test_told(word, kind, number):
    assert mean([number]) == number


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize(argnames=["pair", "other"], argvalues={{(("a", str), 1), (("b", int), 2)}})
def test_numbered(pair, other, number):
    assert mean([number]) == number


@pytest.mark.parametrize("pair", list({pairs}))
def test_listed(pair):
    assert mean([2]) == 2
""")
    survey = take_survey(place[0], sources.locate(str(root)))
    assert {name.split("::")[1].split("[")[0] for name in survey.tests} == {"test_told"}
    assert (len(survey.tests), survey.failing, survey.unstable) == (4, 0, 10)


def test_repository_without_passing_tests(place, tmp_path):
    root = write_repository(tmp_path, "failing-1.0")
    (root / "tests/test_core.py").write_text("def test_no():\n    assert False\n")
    with pytest.raises(UserError, match="none of its tests passes before any defect"):
        take_survey(place[0], sources.locate(str(root)))


def test_combined_defects(place):
    """Two verified defects together: both told, both needed; one repository's combinations repeat from the seed."""
    provider, _, survey = place
    kept = []
    for old, new in (("total += value", "total -= value"), ("value > high", "value >= low"), ("start > 0", "start > 1")):
        item = candidate(place, old, new)
        verdict = validate.check(provider, item)
        assert verdict.outcome == "kept", (old, verdict)
        kept.append((item, verdict.task))
    made = combine.combinations(kept, survey, 6, seed=1)
    assert made == combine.combinations(kept, survey, 6, seed=1) and {c.kind for c in made} == {combine.FILE}
    pair = next(c for c in made if c.function == "clamp, mean")
    task = validate.check(provider, pair, validate.Options(characters=statement.FULL)).task
    assert "clamp(" in task.problem_statement and "mean(" in task.problem_statement and task.strategy == "combine"
    grader = grading.Grader(provider)
    assert grader.grade(task, task.patch).resolved and verify.verify_task(provider, task).problems == ()
    for _, part in kept[:2]:  # the fix of one part alone
        assert grader.grade(task, part.patch).outcome == "unresolved"


def test_combined_in_one_module(tmp_path):
    """Defects of two files of one folder: one patch, two files, and neither half of the fix is enough."""
    text = "def {0}(x):\n    return x + 1\n"
    write_files(tmp_path / "repo", {
        "pkg/__init__.py": "", "pkg/a.py": text.format("up"), "pkg/b.py": text.format("more"),
        "tests/test_pkg.py": "import pytest\nfrom pkg import a, b\n\n\ndef test_up():\n    assert a.up(1) == 2\n\n\ndef test_more():\n"
                             "    assert b.more(5) == 6\n\n\n@pytest.mark.parametrize('n', range(4))\ndef test_nothing(n):\n    pass\n",
    })  # fmt: skip
    spec = sources.locate(str(tmp_path / "repo"))
    with make_provider("local", str(tmp_path / "state")) as provider:
        survey = take_survey(provider, spec)
        kept = []
        for name, function in (("a", "up"), ("b", "more")):
            (injection,) = inject.candidates(text.format(function), f"pkg/{name}.py", ["change_arithmetic"])
            item = candidates.make_candidate(injection, spec, survey, random.Random(0))
            kept.append((item, validate.check(provider, item).task))
        made = combine.combinations(kept, survey, 4, seed=0)
        assert {c.kind for c in made} == {combine.MODULE}
        task = validate.check(provider, made[0], validate.Options(characters=statement.FULL)).task
        assert patches.touched(task.patch) == ["pkg/a.py", "pkg/b.py"] and len(task.FAIL_TO_PASS) == 2
        grader = grading.Grader(provider)
        assert grader.grade(task, task.patch).resolved and verify.verify_task(provider, task).problems == ()
        assert [grader.grade(task, part.patch).outcome for _, part in kept] == ["unresolved", "unresolved"]


def test_held_out_tests(place):
    """Calls that no test makes tell a right fix from one that only serves the tests' own values."""
    provider = place[0]
    task = validate.check(provider, candidate(place, "value > high", "value >= low"), validate.Options(held_out=True)).task
    opinion = heldout.second_opinion(task)
    assert opinion is not None and not set(opinion.FAIL_TO_PASS) & set(task.FAIL_TO_PASS)
    grader = grading.Grader(provider)
    assert grader.grade(opinion, task.patch).resolved and verify.verify_task(provider, task).problems == ()
    start = patches.apply_diff({PATH: SOURCE}, task.bug_patch)
    cheat = start[PATH].replace("    if value < low:", "    if value in (0, 5):\n        return value\n    if value < low:")
    patch = patches.make_diff(start, {PATH: cheat})
    assert grader.grade(task, patch).resolved and not grader.grade(opinion, patch).resolved


def test_held_out_results_that_cannot_be_written_down():
    """They are left out, and not taken for an exception of the function."""
    inside = {"ROOT": ""}
    exec(heldout._SCRIPT, inside)
    attempt = lambda function: inside["attempt"](function, [], {})
    assert attempt(lambda: [1, "a"]) == ("returned", "[1, 'a']")
    assert attempt(lambda: int("a")) == ("raised", "ValueError")
    assert attempt(lambda: object()) is None and attempt(lambda: [attempt]) is None


def test_held_out_copies(place):
    """Where no call can be made anew, copies of the tests under another name: hard-coding on names is noticed."""
    provider = place[0]
    options = validate.Options(held_out=True)
    task = validate.check(provider, candidate(place, "self.items.append(item)", "self.items.append(self)"), options).task
    opinion = heldout.second_opinion(task)
    assert [name.split("::")[0] for name in opinion.FAIL_TO_PASS] == ["tests/test_held_out.py"]
    start = patches.apply_diff({PATH: SOURCE}, task.bug_patch)
    cheat = start[PATH].replace(
        "self.items.append(self)", "import traceback\n        names = str(traceback.extract_stack())\n"
        "        self.items.append(item if 'test_core' in names else self)")
    patch = patches.make_diff(start, {PATH: cheat})
    grader = grading.Grader(provider)
    assert grader.grade(task, patch).resolved and grader.grade(opinion, patch).outcome == "unresolved"
    assert grader.grade(opinion, task.patch).resolved and verify.verify_task(provider, task).problems == ()


def test_scores_and_duplicates(place):
    tasks = [validate.check(place[0], candidate(place, *change)).task for change in (
        ("value > high", "value >= low"), ("total += value", "total -= value"))]  # fmt: skip
    assert all(0 < task.difficulty < 1 and 0 <= task.ambiguity < 1 for task in tasks)
    repeated = dataclasses.replace(tasks[0], instance_id="again")
    vague = dataclasses.replace(tasks[1], instance_id="vague", ambiguity=0.4)
    assert quality.sifted([*tasks, repeated, vague]) == (tasks, {"near_duplicate": 1, "ambiguous": 1})
    assert quality.sifted([*tasks, repeated], near=1.1) == ([*tasks, repeated], {})


def test_ambiguity():
    """Tests that want names which only the fix defines, and nobody says; values that were cut away."""
    fix = patches.make_diff({PATH: "a\n"}, {PATH: "a\n\n\ndef parse_all(x):\n    return x\n"})
    tests = patches.make_diff({}, {"tests/test_a.py": "def test_a():\n    assert parse_all(1)\n"})
    text = "Parsing of all of them at once is missing from the package."
    task = Task("i", "r==1", "", fix, tests, text, ("tests/test_a.py::test_a",), ())
    assert quality.sifted([dataclasses.replace(task, ambiguity=quality.ambiguity(task))])[1] == {"ambiguous": 1}
    said = dataclasses.replace(task, problem_statement=text + " `parse_all` should do it.")
    assert quality.ambiguity(said) == 0.0
    assert quality.ambiguity(dataclasses.replace(said, problem_statement=said.problem_statement + " [1, ...] [2, ...]")) == 0.3


def test_flaky_tests(place):
    """Tests of a task are re-run in both states; the one that wavers is named."""
    provider = place[0]
    task = validate.check(provider, candidate(place, "value > high", "value >= low")).task
    assert quality.flaky_tests(provider, task, 2) == {}
    text = "    import time\n    if time.time_ns() // 1000 % 2:\n        return None\n    if value < low:"
    wavering = patches.make_diff({PATH: SOURCE}, {PATH: SOURCE.replace("    if value < low:", text, 1)})
    found = quality.flaky_tests(provider, dataclasses.replace(
        task, bug_patch=wavering, patch=patches.make_diff({PATH: "x"}, {PATH: "x"})), 6)  # fmt: skip
    assert found and all("of 6 pass" in words for words in found.values())


def test_list_of_tests_beyond_what_one_file_may_hold(tmp_path):
    """Ids of 2.4 MB, where a sandbox gives files of 2 MB."""
    write_files(tmp_path / "long", {
        "pkg/__init__.py": "def up(x):\n    return x + 1\n",
        "tests/test_up.py": "import pytest\nfrom pkg import up\n\n\n"
                            "@pytest.mark.parametrize('x', range(400), ids=lambda x: f'{x:06000}')\n"
                            "def test_up(x):\n    assert up(x) == x + 1\n"})
    with make_provider("local", str(tmp_path / "state")) as provider:
        assert len(take_survey(provider, sources.locate(str(tmp_path / "long"))).tests) == 400


def test_one_repository_costs_no_other(place, tmp_path):
    spec, survey = place[1:]

    class Pool:
        """Answers the first repository's survey, and breaks at the second's."""

        def register(self, specs):
            pass

        def submit(self, function, asked, seconds, **_):
            future = concurrent.futures.Future()
            future.set_result(survey) if asked is spec else future.set_exception(RuntimeError("its server ended"))
            return future

    lines = []
    other = dataclasses.replace(spec, name="other==1.0")
    found, skipped = synthesize.survey_all(Pool(), [spec, other], tmp_path, lines.append)
    assert found == {spec.name: survey} and skipped == {"other==1.0": "other==1.0: RuntimeError: its server ended"}
    assert lines[-1] == "left out: other==1.0: RuntimeError: its server ended"
